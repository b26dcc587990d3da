"""What each process needs to know, as plain values. ``crailfs/config_file.py`` makes them from
``crail.toml``, the environment and the command line.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from crailfs.limits import BLOCK_SIZE_DEFAULT_BYTES, OPERATION_TIMEOUT_MS
from crailfs.records import Tier
from crailfs.units import MIB


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base: immutable, keyword-only, unknown keys are an error."""


class Credentials(Config, frozen=True, kw_only=True):
    """What both ends of a connection prove and check in the handshake."""

    cluster_id: bytes
    """16 bytes; empty on a client: any cluster that knows the secret."""
    secret: bytes


class MetadataConfig(Config, frozen=True, kw_only=True):
    state: Path
    """Directory of LMDB and the journal; made if it does not exist."""
    listen: tuple[str, ...]
    """``unix:/path`` or ``host:port`` (port 0: any free one)."""
    credentials: Credentials
    block_size_bytes: int = BLOCK_SIZE_DEFAULT_BYTES
    """Only for a new name space."""
    tier_high_water: float = 0.9
    """When more than this part of a tier is in use, cold blocks are moved to the next one."""
    tier_low_water: float = 0.8
    """Until not more than this part is; hot blocks are moved up only below it."""


class RegionConfig(Config, frozen=True, kw_only=True):
    tier: Tier
    path: Path
    """The file or device that holds the region: a file on tmpfs for memory, a device or file for
    pmem and nvme, a file on any file system for disk."""
    size_bytes: int
    """Not looked at for a whole device."""
    overwrite: bool = False
    """Make a new region even on a device that holds a file system or anything else; but never over
    a region that can be opened, whatever cluster's it is, or that this server knows."""


class StorageConfig(Config, frozen=True, kw_only=True):
    state: Path
    """Directory of the server's identity and its clients' life lines."""
    metadata: str
    """Address of the metadata server."""
    listen: tuple[str, ...]
    """At most one ``unix:/path`` (same-host clients) and at most one ``host:port``."""
    advertise: str = ""
    """The host that TCP clients are told to connect to; empty: the one listened on."""
    host: str = ""
    """This host's name for placement; empty: the kernel's."""
    rack: str = ""
    rdma_device: str = "auto"
    """Which device RDMA is offered on: its verbs name, ``auto`` (the first with an active port that
    has the address of ``listen``, or else the first with an active port) or ``off``."""
    rdma_flush: bool = True
    """Whether clients may use RDMA FLUSH where the device has it."""
    move_bytes_per_second: int = 256 * MIB
    """At most this much is moved between tiers; 0: nothing is."""
    regions: tuple[RegionConfig, ...]
    credentials: Credentials


class ClientConfig(Config, frozen=True, kw_only=True):
    metadata: str
    credentials: Credentials
    host: str = ""
    """This host's name for placement; empty: the kernel's."""
    transports: tuple[str, ...] = ("local", "rdma", "tcp")
    """Tried in this order for each storage server."""
    rdma_device: str = "auto"
    """As in ``StorageConfig``; ``auto`` is the first device with an active port."""
    operation_timeout_ms: int = OPERATION_TIMEOUT_MS


class MountConfig(Config, frozen=True, kw_only=True):
    client: ClientConfig
    mountpoint: Path
    allow_other: bool = True
    read_ahead_kib: int = 1024
    foreground_ready_fd: int = -1
    """A descriptor that gets one byte when the mount is usable; -1: none."""
