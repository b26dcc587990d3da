"""The one interface of all media, and the choice of a medium for a tier.

Offsets are bytes from the region's first block. Callers check them against the region's bounds;
nothing here is asked for a byte that the region does not have.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from crailfs.config import RegionConfig
from crailfs.errors import ConfigurationError
from crailfs.records import Tier
from storage_server.media.disk import DiskMedium
from storage_server.media.memory import MemoryMedium
from storage_server.media.superblock import Superblock


class Medium(Protocol):
    """The bytes of one region."""

    path: Path
    superblock: Superblock
    durable: bool
    """Whether ``flush`` makes bytes outlive a power cut."""
    mappable: bool
    """Whether clients of this host map the file; otherwise they read and write it."""
    shared_fd: int
    """What clients of this host are passed: an open of the file that holds no lock of ours."""
    blocks: memoryview | None
    """All blocks, mapped: payloads go straight into them and out of them. None: use ``read_into``
    and ``write``."""
    usable_blocks: int
    """Blocks from the start that may be handed out."""

    def read_into(self, offset: int, buffer: memoryview, *, wait: bool) -> bool:
        """Fill ``buffer`` from ``offset``; without ``wait``, False if a device would be waited for.

        Raises ``OSError`` if the device cannot deliver the bytes.
        """

    def write_inline(self, offset: int, data: memoryview) -> bool:
        """``write`` in the event loop, or False if that should be left to a thread."""

    def write(self, offset: int, data: memoryview) -> None:
        """May wait for the device. Raises ``OSError`` if it does not take the bytes."""

    def flush(self) -> bool:
        """Make all bytes written before as durable as they can be; waits. True: durable."""

    def provision(self, wanted_blocks: int) -> bool:
        """Take one bounded step of making blocks below ``wanted_blocks`` usable and fast; waits.

        True: there may be more to do. False: nothing is left to do. Raises ``NoSpaceError`` if
        the host has no room at present.
        """

    def close(self) -> None:
        """Give up the file and its lock; views of ``blocks`` stay valid until they are dropped."""


def open_medium(
    config: RegionConfig, *, cluster_id: bytes, block_size_bytes: int, known_uuid: bytes | None
) -> Medium:
    """The medium of ``config``'s tier at its path, made if it is new. Blocks: call in a thread.

    Raises what ``region_file.open_region_file`` does.
    """
    if config.tier == Tier.MEMORY:
        return MemoryMedium.open(
            config, cluster_id=cluster_id, block_size_bytes=block_size_bytes, known_uuid=known_uuid
        )
    if config.tier in (Tier.NVME, Tier.DISK):
        return DiskMedium.open(
            config, cluster_id=cluster_id, block_size_bytes=block_size_bytes, known_uuid=known_uuid
        )
    raise ConfigurationError(
        f"region {config.path}: tier {config.tier.name.lower()} has no medium in this version; "
        "use memory, nvme or disk"
    )
