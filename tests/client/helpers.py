"""What the client's tests share."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import trio

from crailfs.client.filesystem import FileSystem, OpenFile
from crailfs.records import NodeKind, StorageClass, Tier
from crailfs.units import ROOT_INODE

BLOCK = 65_536
MEMORY_ONLY = StorageClass(Tier.PMEM, Tier.MEMORY)
DISK_ONLY = StorageClass(Tier.DISK, Tier.DISK)


async def create(
    filesystem: FileSystem,
    name: bytes = b"file",
    *,
    parent: int = ROOT_INODE,
    storage_class: StorageClass | None = None,
) -> OpenFile:
    reply = await filesystem.create_node(
        parent, name, NodeKind.FILE, mode=0o644, uid=0, gid=0, storage_class=storage_class
    )
    return await filesystem.open(reply.attributes.ino)


async def open_by_name(
    filesystem: FileSystem, name: bytes = b"file", parent: int = ROOT_INODE
) -> OpenFile:
    return await filesystem.open((await filesystem.lookup(parent, name)).ino)


async def content(file: OpenFile) -> bytes:
    return bytes(await file.read(0, 1 << 40))


async def free_blocks(filesystem: FileSystem) -> int:
    return sum(tier.free_blocks for tier in (await filesystem.statistics()).tiers)


def overwrite_everywhere(region: Path, old: bytes, new: bytes) -> int:
    """Damage each place of a region's file that holds ``old``; returns how many those were."""
    assert len(old) == len(new)
    held = region.read_bytes()
    count = held.count(old)
    with region.open("r+b") as file:
        at = held.find(old)
        while at >= 0:
            file.seek(at)
            file.write(new)
            at = held.find(old, at + 1)
    return count


async def eventually(
    condition: Callable[[], Awaitable[bool]], *, timeout_seconds: float = 20.0
) -> None:
    """For what happens in the background on a timer of its own."""
    with trio.fail_after(timeout_seconds):
        while not await condition():  # noqa: ASYNC110
            await trio.sleep(0.05)
