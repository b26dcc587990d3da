"""From what a person wrote (a TOML value, or a string from the environment or the command line) to
the value that a process needs. Each parser raises ``ValueError`` with what it expected.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from crailfs.records import Tier
from crailfs.units import GIB, KIB, MIB

Parser = Callable[[object, Path], Any]
"""Takes the raw value and the directory that a relative path is relative to."""

UNIX_PATH_MAX_BYTES: Final = 107
"""The kernel's ``sun_path`` less its closing zero."""
TRANSPORT_NAMES: Final = ("local", "rdma", "tcp")

_UNITS: Final = {"": 1, "B": 1, "K": KIB, "M": MIB, "G": GIB, "T": 1 << 40, "P": 1 << 50}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGTP]?)(?:i?B)?", re.IGNORECASE)
_HOST = re.compile(r"[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]")


def text(raw: object, _base: Path) -> str:
    if not isinstance(raw, str):
        raise ValueError("a string")
    return raw


def path(raw: object, base: Path) -> Path:
    if not isinstance(raw, str) or not raw or "\0" in raw:
        raise ValueError("a path")
    return base / Path(raw).expanduser()


def size(raw: object, _base: Path) -> int:
    """Bytes: a number, or a number with a binary unit (``4GiB``, ``64K``, ``1.5 TiB``)."""
    if isinstance(raw, int) and not isinstance(raw, bool) and raw >= 0:
        return raw
    found = _SIZE.fullmatch(raw.strip()) if isinstance(raw, str) else None
    if found is None:
        raise ValueError("a size such as '4GiB', '512MiB' or a number of bytes")
    amount, unit = found.groups()
    scaled = float(amount) * _UNITS[unit.upper()] if "." in amount else None
    return int(scaled) if scaled is not None else int(amount) * _UNITS[unit.upper()]


def boolean(raw: object, _base: Path) -> bool:
    if isinstance(raw, bool):
        return raw
    if isinstance(raw, str) and raw.lower() in ("true", "false"):
        return raw.lower() == "true"
    raise ValueError("true or false")


def whole_number(least: int, most: int) -> Parser:
    def parse(raw: object, _base: Path) -> int:
        if isinstance(raw, str) and raw.isascii() and raw.isdigit():
            raw = int(raw)
        if isinstance(raw, bool) or not isinstance(raw, int) or not least <= raw <= most:
            raise ValueError(f"a whole number from {least} to {most}")
        return raw

    return parse


def fraction(raw: object, _base: Path) -> float:
    """More than 0, at most 1."""
    try:
        value = float(raw) if isinstance(raw, str | int | float) else 0.0
    except ValueError:
        value = 0.0
    if isinstance(raw, bool) or not 0 < value <= 1:
        raise ValueError("a number above 0 and not above 1")
    return value


def identity(raw: object, _base: Path) -> bytes:
    if not isinstance(raw, str) or len(raw) != 32 or not set(raw) <= set(string.hexdigits):
        raise ValueError("32 hexadecimal digits")
    return bytes.fromhex(raw)


def tier(raw: object, _base: Path) -> Tier:
    if isinstance(raw, str) and raw.upper() in Tier.__members__:
        return Tier[raw.upper()]
    raise ValueError("one of " + ", ".join(f"'{each.name.lower()}'" for each in Tier))


def address(raw: object, _base: Path) -> str:
    """``unix:/path`` or ``host:port``; an IPv6 host stands in brackets."""
    if isinstance(raw, str) and raw.startswith("unix:/"):
        if len(raw.removeprefix("unix:").encode()) > UNIX_PATH_MAX_BYTES:
            raise ValueError(f"a socket path of at most {UNIX_PATH_MAX_BYTES} bytes")
        return raw
    if isinstance(raw, str):
        host, _, port = raw.rpartition(":")
        if _HOST.fullmatch(host) and port.isascii() and port.isdigit() and int(port) < 1 << 16:
            return raw
    raise ValueError("'unix:/path' or 'host:port'")


def _list_of(raw: object) -> list[object]:
    if isinstance(raw, str):
        return [part.strip() for part in raw.split(",") if part.strip()]
    if isinstance(raw, list):
        return raw
    raise ValueError("a list of strings")


def addresses(raw: object, base: Path) -> tuple[str, ...]:
    found = tuple(address(each, base) for each in _list_of(raw))
    if not found:
        raise ValueError("at least one address ('unix:/path' or 'host:port')")
    return found


def storage_addresses(raw: object, base: Path) -> tuple[str, ...]:
    found = addresses(raw, base)
    unix_count = sum(each.startswith("unix:") for each in found)
    if unix_count > 1 or len(found) - unix_count > 1:
        raise ValueError("at most one 'unix:/path' and at most one 'host:port'")
    return found


def transports(raw: object, _base: Path) -> tuple[str, ...]:
    found = _list_of(raw)
    if not found or len(set(map(str, found))) != len(found) or set(found) - set(TRANSPORT_NAMES):
        names = ", ".join(f"'{name}'" for name in TRANSPORT_NAMES)
        raise ValueError(f"a list of different transports out of {names}")
    return tuple(str(each) for each in found)
