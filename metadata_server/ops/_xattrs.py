"""Extended attributes: which names there can be, and those that show and set the placement."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from msgspec.structs import replace

from crailfs.errors import (
    InvalidError,
    NameTooLongError,
    NotPermittedError,
    NotSupportedError,
)
from crailfs.limits import XATTR_NAME_MAX_BYTES
from crailfs.records import DATA_KINDS, DIRECTORY_KINDS, Attributes, Durability, Placement
from crailfs.records import StorageClass as _StorageClass
from metadata_server.ops.create_node import check_placement

CRAIL_PREFIX = b"user.crail."
TTL_XATTR = b"user.crail.ttl"
_NAMESPACES = (b"user.", b"trusted.", b"security.")
_TTL_UNITS_S = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}
_USER_KINDS = DATA_KINDS | DIRECTORY_KINDS


def check_xattr_name(node: Attributes, name: bytes) -> None:
    """Raise unless ``node`` can have an extended attribute ``name``.

    As on Linux: ``user.`` attributes are for files and directories only, and a name space that is
    not stored is answered with EOPNOTSUPP.
    """
    if len(name) > XATTR_NAME_MAX_BYTES:
        raise NameTooLongError(
            f"extended attribute name of {len(name)} bytes: at most {XATTR_NAME_MAX_BYTES}"
        )
    if not name.startswith(_NAMESPACES):
        raise NotSupportedError(f"extended attribute {name!r}: only user., trusted. and security.")
    if name in _NAMESPACES or b"\0" in name:
        raise InvalidError(f"{name!r} cannot name an extended attribute")
    if name.startswith(b"user.") and node.kind not in _USER_KINDS:
        raise NotPermittedError(f"{name!r}: only files and directories have user attributes")


class CrailXattr(NamedTuple):
    """One ``user.crail.`` attribute. ``parse`` returns the placement with the value set."""

    show: Callable[[Attributes, int], str]
    parse: Callable[[Attributes, str, int], Placement]
    reset: Callable[[Placement, Placement], Placement] | None
    """From the node's placement and its default; None: it cannot be removed."""


def _parse_integer(name: str, text: str, form: str = "a whole number") -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 19):
        raise InvalidError(f"user.crail.{name}: {text[:32]!r} is not {form}")
    return int(text)


def _set_storage_class(node: Attributes, text: str, block_size_bytes: int) -> Placement:
    return replace(node.placement, storage_class=_StorageClass.parse(text))


def _set_location(node: Attributes, text: str, block_size_bytes: int) -> Placement:
    return replace(node.placement, location=text)


def _set_block_size(node: Attributes, text: str, block_size_bytes: int) -> Placement:
    blocks, rest = divmod(_parse_integer("block_size", text), block_size_bytes)
    if rest or not blocks:
        raise InvalidError(
            f"user.crail.block_size: {text} is not a multiple of the cluster's block size, "
            f"{block_size_bytes} bytes"
        )
    return replace(node.placement, allocation_blocks=blocks)


def _set_replicas(node: Attributes, text: str, block_size_bytes: int) -> Placement:
    return replace(node.placement, replicas=_parse_integer("replicas", text))


def _set_durability(node: Attributes, text: str, block_size_bytes: int) -> Placement:
    try:
        durability = Durability[text.upper()]
    except KeyError:
        raise InvalidError(f"user.crail.durability: {text[:32]!r} is not fsync or close") from None
    return replace(node.placement, durability=durability)


def _set_pinned(node: Attributes, text: str, block_size_bytes: int) -> Placement:
    if text not in ("true", "false"):
        raise InvalidError(f"user.crail.pin: {text[:32]!r} is not true or false")
    return replace(node.placement, pinned=text == "true")


def _set_ttl(node: Attributes, text: str, block_size_bytes: int) -> Placement:
    unit_s = _TTL_UNITS_S.get(text[-1:])
    number = _parse_integer(
        "ttl",
        text if unit_s is None else text[:-1],
        "a whole number of seconds, nor one with s, m, h or d behind it",
    )
    return replace(node.placement, ttl_s=number * (unit_s or 1), ttl_is_own=True)


def _set_kind(node: Attributes, text: str, block_size_bytes: int) -> Placement:
    # Copying all attributes to a node of the same kind works; nothing can change the kind.
    if text != node.kind.name.lower():
        raise NotPermittedError("user.crail.kind is read-only: a node's kind never changes")
    return node.placement


CRAIL_XATTRS: dict[bytes, CrailXattr] = {
    b"user.crail.storage_class": CrailXattr(
        lambda node, _: str(node.placement.storage_class),
        _set_storage_class,
        lambda placement, default: replace(placement, storage_class=default.storage_class),
    ),
    b"user.crail.location": CrailXattr(
        lambda node, _: node.placement.location,
        _set_location,
        lambda placement, default: replace(placement, location=default.location),
    ),
    b"user.crail.block_size": CrailXattr(
        lambda node, block_size: str(node.placement.allocation_blocks * block_size),
        _set_block_size,
        lambda placement, default: replace(placement, allocation_blocks=default.allocation_blocks),
    ),
    b"user.crail.replicas": CrailXattr(
        lambda node, _: str(node.placement.replicas),
        _set_replicas,
        lambda placement, default: replace(placement, replicas=default.replicas),
    ),
    b"user.crail.durability": CrailXattr(
        lambda node, _: node.placement.durability.name.lower(),
        _set_durability,
        lambda placement, default: replace(placement, durability=default.durability),
    ),
    b"user.crail.pin": CrailXattr(
        lambda node, _: "true" if node.placement.pinned else "false",
        _set_pinned,
        lambda placement, default: replace(placement, pinned=default.pinned),
    ),
    TTL_XATTR: CrailXattr(
        lambda node, _: str(node.placement.ttl_s),
        _set_ttl,
        lambda placement, default: replace(placement, ttl_s=default.ttl_s, ttl_is_own=False),
    ),
    b"user.crail.kind": CrailXattr(lambda node, _: node.kind.name.lower(), _set_kind, None),
}
"""In the order in which they are listed."""


def crail_xattr(name: bytes) -> CrailXattr:
    """The attribute ``name``; InvalidError lists what there is."""
    found = CRAIL_XATTRS.get(name)
    if found is None:
        known = ", ".join(known.decode() for known in CRAIL_XATTRS)
        raise InvalidError(f"{name!r} is not one of the attributes under user.crail.: {known}")
    return found


def placement_set(name: bytes, node: Attributes, value: bytes, block_size_bytes: int) -> Placement:
    """``node``'s placement with the ``user.crail.`` attribute ``name`` set; InvalidError if bad."""
    attribute = crail_xattr(name)
    try:
        text = value.decode()
    except UnicodeDecodeError:
        raise InvalidError(f"{name.decode()}: the value is not UTF-8 text") from None
    placement = attribute.parse(node, text, block_size_bytes)
    check_placement(placement)
    return placement
