"""The one interface of all media, and the choice of a medium for a tier.

Offsets are bytes from the region's first block. Callers check them against the region's bounds;
nothing here is asked for a byte that the region does not have.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from crailfs.config import RegionConfig
from crailfs.records import Tier
from storage_server.media.disk import DiskMedium
from storage_server.media.headers import HeaderStore
from storage_server.media.layout import Layout
from storage_server.media.memory import MemoryMedium
from storage_server.media.nvme import NvmeMedium
from storage_server.media.pmem import PmemMedium
from storage_server.media.superblock import Superblock


class Medium(Protocol):
    """The bytes of one region."""

    path: Path
    superblock: Superblock
    kind: str
    """For people: ``tmpfs``, ``devdax``, ``file with direct I/O`` and so on."""
    durable: bool
    """Whether ``flush`` makes bytes outlive a power cut."""
    layout: Layout
    """How clients of this host reach the blocks through ``shared_fd``."""
    shared_fd: int
    """What clients of this host are passed: an open of the file that holds no lock of ours."""
    blocks: memoryview | None
    """All blocks, mapped: payloads go straight into them and out of them. None: use the reads and
    writes below."""
    usable_blocks: int
    """Blocks from the start that may be handed out."""

    @property
    def headers(self) -> HeaderStore | None:
        """None: the medium keeps none."""

    def try_read(self, offset: int, buffer: memoryview) -> bool:
        """``read`` in the event loop; False if the device would have to be waited for."""

    async def read(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from ``offset``. Raises ``OSError`` if the device cannot deliver it."""

    def try_write(self, offset: int, data: memoryview) -> bool:
        """``write`` in the event loop; False if the device would have to be waited for."""

    async def write(self, offset: int, data: memoryview) -> None:
        """Any later read sees ``data``. Goes on to its end when it is cancelled: an abandoned write
        never arrives later. Raises ``OSError`` if the device does not take the bytes."""

    def persist(self, offset: int, byte_count: int) -> None:
        """These bytes were put into ``blocks`` directly: where the medium can make them durable
        without waiting for a device (persistent memory), do it now."""

    async def flush(self) -> bool:
        """Make all bytes written before as durable as they can be. True: they outlive a power cut.
        Raises ``OSError`` if the device fails."""

    async def discard(self, first_block: int, block_count: int) -> None:
        """Nobody needs these blocks' bytes: tell the device, if it wants to know."""

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
    if config.tier == Tier.PMEM:
        return PmemMedium.open(
            config, cluster_id=cluster_id, block_size_bytes=block_size_bytes, known_uuid=known_uuid
        )
    if config.tier == Tier.NVME:
        return NvmeMedium.open(
            config, cluster_id=cluster_id, block_size_bytes=block_size_bytes, known_uuid=known_uuid
        )
    return DiskMedium.open(
        config, cluster_id=cluster_id, block_size_bytes=block_size_bytes, known_uuid=known_uuid
    )
