"""``crail.toml``, ``CRAIL_*`` variables and ``--set`` options -> the structs of ``crailfs.config``.

Precedence, highest first: command line (``--set section.key=value``), environment
(``CRAIL_SECTION_KEY``), file, default. Whatever cannot be used is a ``ConfigurationError`` that
names where it stands, the key, what was expected and what was found.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from crailfs import config_values as values
from crailfs.config import (
    ClientConfig,
    Credentials,
    MetadataConfig,
    MountConfig,
    RegionConfig,
    StorageConfig,
)
from crailfs.errors import ConfigurationError
from crailfs.limits import (
    BLOCK_SIZE_DEFAULT_BYTES,
    BLOCK_SIZE_MAX_BYTES,
    BLOCK_SIZE_MIN_BYTES,
    OPERATION_TIMEOUT_MS,
    REGIONS_PER_SERVER_MAX,
    SECRET_MAX_BYTES,
    SECRET_MIN_BYTES,
)
from crailfs.units import MIB

SYSTEM_FILE: Final = Path("/etc/crail/crail.toml")
"""Read when neither ``--config`` nor ``CRAIL_CONFIG`` names another file."""

_REQUIRED: Final = object()


class Key(NamedTuple):
    parse: values.Parser
    default: Any = _REQUIRED


SECTIONS: Final[dict[str, dict[str, Key]]] = {
    "cluster": {
        "id": Key(values.identity, b""),
        "secret_file": Key(values.path),
        "metadata": Key(values.address),
    },
    "metadata": {
        "state": Key(values.path),
        "listen": Key(values.addresses),
        "block_size": Key(values.size, BLOCK_SIZE_DEFAULT_BYTES),
        "tier_high_water": Key(values.fraction, 0.9),
        "tier_low_water": Key(values.fraction, 0.8),
    },
    "storage": {
        "state": Key(values.path),
        "listen": Key(values.storage_addresses),
        "advertise": Key(values.text, ""),
        "host": Key(values.text, ""),
        "rack": Key(values.text, ""),
        "rdma_device": Key(values.text, "auto"),
        "rdma_flush": Key(values.boolean, True),
        "move_rate": Key(values.size, 256 * MIB),
    },
    "client": {
        "host": Key(values.text, ""),
        "transports": Key(values.transports, values.TRANSPORT_NAMES),
        "rdma_device": Key(values.text, "auto"),
        "operation_timeout_ms": Key(values.whole_number(100, 24 * 3_600_000), OPERATION_TIMEOUT_MS),
    },
    "mount": {
        "mountpoint": Key(values.path),
        "allow_other": Key(values.boolean, True),
        "read_ahead_kib": Key(values.whole_number(0, 1 << 16), 1024),
    },
}
"""Every key that there is, but for those of a region."""

REGION_KEYS: Final[dict[str, Key]] = {
    "tier": Key(values.tier),
    "path": Key(values.path),
    "size": Key(values.size, 0),
    "overwrite": Key(values.boolean, False),
}
"""Of one ``[[storage.region]]``; these stand in the file only."""

OTHER_VARIABLES: Final = frozenset({"CRAIL_CONFIG", "CRAIL_STATE_HOME", "CRAIL_LOG_LEVEL"})
"""``CRAIL_*`` variables that are not settings of a section."""

OTHER_PREFIXES: Final = ("CRAIL_LAB", "CRAIL_TEST")
"""Of the project's own tests."""

VARIABLES: Final[dict[str, tuple[str, str]]] = {
    f"CRAIL_{section}_{key}".upper(): (section, key)
    for section, keys in SECTIONS.items()
    for key in keys
}


class _Raw(NamedTuple):
    value: object
    where: str
    """For messages: the file and key, the variable, or the option."""
    base: Path


class Settings:
    """All that was set, by whom, for whichever process asks for its part."""

    def __init__(
        self, values_by_key: dict[tuple[str, str], _Raw], regions: list[dict[str, _Raw]], name: str
    ) -> None:
        self._values = values_by_key
        self._regions = regions
        self._name = name

    @classmethod
    def load(
        cls,
        file: Path | None,
        overrides: Sequence[str] = (),
        environment: Mapping[str, str] = os.environ,
    ) -> Settings:
        """Merge ``file`` (None: no file), ``environment`` and ``overrides`` ("section.key=value").

        Raises:
            ConfigurationError: unreadable file, not TOML, unknown key or variable.
        """
        merged: dict[tuple[str, str], _Raw] = {}
        regions: list[dict[str, _Raw]] = []
        if file is not None:
            merged, regions = _from_file(file)
        merged |= _from_environment(environment)
        merged |= _from_overrides(overrides)
        return cls(merged, regions, str(file) if file is not None else "no configuration file")

    def get(self, section: str, key: str) -> Any:
        """One setting's value, or its default; ``ConfigurationError`` if it is wrong or missing."""
        declared = SECTIONS[section][key]
        raw = self._values.get((section, key))
        if raw is not None:
            return _parse(declared, raw)
        if declared.default is _REQUIRED:
            raise ConfigurationError(_missing(self._name, section, key))
        return declared.default

    def is_set(self, section: str, key: str) -> bool:
        """Whether anybody set it, be it well or wrongly."""
        return (section, key) in self._values

    def where(self, section: str, key: str) -> str:
        raw = self._values.get((section, key))
        return raw.where if raw is not None else f"{self._name}: {section}.{key}"

    def credentials(self) -> Credentials:
        secret = read_secret(
            self.get("cluster", "secret_file"), self.where("cluster", "secret_file")
        )
        return Credentials(cluster_id=self.get("cluster", "id"), secret=secret)

    def metadata(self) -> MetadataConfig:
        block_size_bytes = self.get("metadata", "block_size")
        if (
            block_size_bytes & (block_size_bytes - 1)
            or not BLOCK_SIZE_MIN_BYTES <= block_size_bytes <= BLOCK_SIZE_MAX_BYTES
        ):
            raise ConfigurationError(
                f"{self.where('metadata', 'block_size')}: expected a power of two from 4KiB to "
                f"1MiB, found {block_size_bytes} bytes"
            )
        low_water, high_water = (
            self.get("metadata", "tier_low_water"),
            self.get("metadata", "tier_high_water"),
        )
        if low_water > high_water:
            raise ConfigurationError(
                f"{self.where('metadata', 'tier_low_water')}: expected at most tier_high_water, "
                f"{high_water}, found {low_water}"
            )
        return MetadataConfig(
            state=self.get("metadata", "state"),
            listen=self.get("metadata", "listen"),
            credentials=self.credentials(),
            block_size_bytes=block_size_bytes,
            tier_high_water=high_water,
            tier_low_water=low_water,
        )

    def regions(self) -> tuple[RegionConfig, ...]:
        """The storage server's regions as configured; at least one, no path twice."""
        found = []
        for index, raw in enumerate(self._regions):
            for key in REGION_KEYS:
                if key not in raw and REGION_KEYS[key].default is _REQUIRED:
                    raise ConfigurationError(
                        f"{self._name}: storage.region[{index}]: {key} is not set"
                    )
            parsed = {
                key: _parse(declared, raw[key]) if key in raw else declared.default
                for key, declared in REGION_KEYS.items()
            }
            found.append(
                RegionConfig(
                    tier=parsed["tier"],
                    path=parsed["path"],
                    size_bytes=parsed["size"],
                    overwrite=parsed["overwrite"],
                )
            )
        if not 1 <= len(found) <= REGIONS_PER_SERVER_MAX:
            raise ConfigurationError(
                f"{self._name}: storage.region: expected 1 to {REGIONS_PER_SERVER_MAX} "
                f"[[storage.region]] tables, found {len(found)}"
            )
        paths = [region.path for region in found]
        for index, path in enumerate(paths):
            if path in paths[:index]:
                raise ConfigurationError(
                    f"{self._name}: storage.region[{index}].path: expected a file of its own, "
                    f"found {path} a second time"
                )
        return tuple(found)

    def storage(self) -> StorageConfig:
        return StorageConfig(
            state=self.get("storage", "state"),
            metadata=self.get("cluster", "metadata"),
            listen=self.get("storage", "listen"),
            advertise=self.get("storage", "advertise"),
            host=self.get("storage", "host"),
            rack=self.get("storage", "rack"),
            rdma_device=self.get("storage", "rdma_device"),
            rdma_flush=self.get("storage", "rdma_flush"),
            move_bytes_per_second=self.get("storage", "move_rate"),
            regions=self.regions(),
            credentials=self.credentials(),
        )

    def client(self) -> ClientConfig:
        return ClientConfig(
            metadata=self.get("cluster", "metadata"),
            credentials=self.credentials(),
            host=self.get("client", "host"),
            transports=self.get("client", "transports"),
            rdma_device=self.get("client", "rdma_device"),
            operation_timeout_ms=self.get("client", "operation_timeout_ms"),
        )

    def mount(self, ready_fd: int = -1) -> MountConfig:
        return MountConfig(
            client=self.client(),
            mountpoint=self.get("mount", "mountpoint"),
            allow_other=self.get("mount", "allow_other"),
            read_ahead_kib=self.get("mount", "read_ahead_kib"),
            foreground_ready_fd=ready_fd,
        )


def read_secret(file: Path, where: str) -> bytes:
    """The cluster's secret: the file's bytes less white space at both ends.

    Raises:
        ConfigurationError: the file cannot be read, is readable by others, or is too short or long.
    """
    try:
        with file.open("rb") as opened:
            mode = os.fstat(opened.fileno()).st_mode & 0o777
            secret = opened.read(SECRET_MAX_BYTES + 1)
    except OSError as error:
        raise ConfigurationError(
            f"{where}: cannot read the secret file {file}: {error.strerror}"
        ) from error
    if mode & 0o077:
        raise ConfigurationError(
            f"{where}: {file} has mode {mode:04o}, so that others than its owner can read the "
            f"cluster's secret: chmod 600 {file}"
        )
    secret = secret.strip()
    if not SECRET_MIN_BYTES <= len(secret) <= SECRET_MAX_BYTES:
        raise ConfigurationError(
            f"{where}: {file}: expected a secret of {SECRET_MIN_BYTES} to {SECRET_MAX_BYTES} bytes"
        )
    return secret


def find_file(option: str | None, environment: Mapping[str, str] = os.environ) -> Path | None:
    """Which configuration file counts: the option, ``CRAIL_CONFIG``, the system's, or none."""
    named = option or environment.get("CRAIL_CONFIG")
    if named:
        return Path(named)
    return SYSTEM_FILE if SYSTEM_FILE.exists() else None


def _missing(name: str, section: str, key: str) -> str:
    variable = f"CRAIL_{section}_{key}".upper()
    return f"{name}: {section}.{key} is not set: set it there, by {variable} or by --set"


def _parse(key: Key, raw: _Raw) -> Any:
    try:
        return key.parse(raw.value, raw.base)
    except ValueError as expected:
        raise ConfigurationError(
            f"{raw.where}: expected {expected}, found {raw.value!r}"
        ) from expected


def _unknown(what: str, name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean '{near[0]}'?" if near else "expected one of " + ", ".join(sorted(known))
    return f"{what}: unknown key; {hint}"


def _from_file(
    file: Path,
) -> tuple[dict[tuple[str, str], _Raw], list[dict[str, _Raw]]]:
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(
            f"{file}: cannot read the configuration file: {error.strerror}"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{file}: not a TOML file: {error}") from error
    base = file.absolute().parent
    merged: dict[tuple[str, str], _Raw] = {}
    regions: list[dict[str, _Raw]] = []
    for section, table in document.items():
        if section not in SECTIONS:
            raise ConfigurationError(_unknown(f"{file}: {section}", section, tuple(SECTIONS)))
        if not isinstance(table, dict):
            raise ConfigurationError(f"{file}: {section}: expected a table, found {table!r}")
        for key, value in table.items():
            where = f"{file}: {section}.{key}"
            if (section, key) == ("storage", "region"):
                regions = _regions_from_file(file, value, base)
            elif key in SECTIONS[section]:
                merged[section, key] = _Raw(value, where, base)
            else:
                known = [*SECTIONS[section], *(["region"] if section == "storage" else [])]
                raise ConfigurationError(_unknown(where, key, known))
    return merged, regions


def _regions_from_file(file: Path, tables: object, base: Path) -> list[dict[str, _Raw]]:
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise ConfigurationError(f"{file}: storage.region: expected [[storage.region]] tables")
    found = []
    for index, table in enumerate(tables):
        region = {}
        for key, value in table.items():
            where = f"{file}: storage.region[{index}].{key}"
            if key not in REGION_KEYS:
                raise ConfigurationError(_unknown(where, key, tuple(REGION_KEYS)))
            region[key] = _Raw(value, where, base)
        found.append(region)
    return found


def _from_environment(environment: Mapping[str, str]) -> dict[tuple[str, str], _Raw]:
    found = {}
    for name, value in environment.items():
        if name in VARIABLES:
            found[VARIABLES[name]] = _Raw(value, f"environment: {name}", Path.cwd())
        elif (
            name.startswith("CRAIL_")
            and name not in OTHER_VARIABLES
            and not name.startswith(OTHER_PREFIXES)
        ):
            near = difflib.get_close_matches(name, VARIABLES, n=1, cutoff=0.8)
            prefix = tuple(f"CRAIL_{section.upper()}_" for section in SECTIONS)
            if near or name.startswith(prefix):
                raise ConfigurationError(_unknown(f"environment: {name}", name, tuple(VARIABLES)))
    return found


def _from_overrides(overrides: Sequence[str]) -> dict[tuple[str, str], _Raw]:
    found = {}
    for override in overrides:
        name, equals, value = override.partition("=")
        section, _, key = name.partition(".")
        if not equals:
            raise ConfigurationError(f"--set {override}: expected section.key=value")
        if key not in SECTIONS.get(section, {}):
            known = [f"{section}.{key}" for section, keys in SECTIONS.items() for key in keys]
            raise ConfigurationError(_unknown(f"--set {name}", name, known))
        found[section, key] = _Raw(value, f"--set {name}", Path.cwd())
    return found
