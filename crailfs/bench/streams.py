"""Files written and read in a row through the client library, and room for them in a tier."""

from __future__ import annotations

import random
import time
from typing import Final

import trio

from crailfs.client.store import CrailStore
from crailfs.client.stream import StoreFile
from crailfs.errors import CrailError, NoSpaceError
from crailfs.records import Tier
from crailfs.units import MIB

_FREE_TIMEOUT_SECONDS: Final = 60.0
_CONTENT: Final = memoryview(random.Random(1).randbytes(MIB))


async def write(store: CrailStore, path: str, chunk_bytes: int, total_bytes: int) -> float:
    """Make the file ``path`` in chunks of at most 1 MiB, flushed at the end; in 10^6 bytes a
    second, the flush included."""
    began = time.perf_counter()
    async with await store.create(path, exclusive=True) as file:
        await write_to(file, chunk_bytes, total_bytes)
        await file.sync()
    return total_bytes / (time.perf_counter() - began) / 1e6


async def read(store: CrailStore, path: str, chunk_bytes: int, total_bytes: int) -> float:
    """The file again, in 10^6 bytes a second."""
    began = time.perf_counter()
    async with await store.open(path) as file:
        await read_from(file, chunk_bytes, total_bytes)
    return total_bytes / (time.perf_counter() - began) / 1e6


async def write_to(file: StoreFile, chunk_bytes: int, total_bytes: int) -> None:
    """In chunks of at most 1 MiB."""
    pieces = [
        _CONTENT[offset : offset + chunk_bytes] for offset in range(0, len(_CONTENT), chunk_bytes)
    ]
    for number in range(total_bytes // chunk_bytes):
        await file.write(pieces[number % len(pieces)])


async def read_from(file: StoreFile, chunk_bytes: int, total_bytes: int) -> None:
    """To the end. Raises ``CrailError`` if that is not after ``total_bytes``."""
    buffer = bytearray(chunk_bytes)
    amount = 0
    while count := await file.readinto(buffer):
        amount += count
    if amount != total_bytes:
        raise CrailError(f"read {amount} bytes of {total_bytes}")


async def warm_up(store: CrailStore, directory: str, tier: Tier) -> None:
    """Use every block of the tier once, so that no file's first touch of it is measured."""
    free_bytes = await _free_bytes(store, tier)
    path = f"{directory}/warm-up"
    async with await store.create(path, exclusive=True) as file:
        try:
            while True:
                await file.write(_CONTENT)
        except NoSpaceError:
            await file.sync()
    await store.delete(path)
    await wait_for_space(store, tier, free_bytes - free_bytes // 8)


async def wait_for_space(store: CrailStore, tier: Tier, wanted_bytes: int) -> None:
    """Until what was removed has come free in the tier. Raises ``NoSpaceError``."""
    deadline = trio.current_time() + _FREE_TIMEOUT_SECONDS
    while await _free_bytes(store, tier) < wanted_bytes:
        if trio.current_time() > deadline:
            raise NoSpaceError(
                f"of the {tier.name.lower()} tier less than {wanted_bytes} bytes came free within "
                f"{_FREE_TIMEOUT_SECONDS:.0f} s of removing what was in it"
            )
        await trio.sleep(0.05)


async def _free_bytes(store: CrailStore, tier: Tier) -> int:
    tiers = (await store.statistics()).tiers
    free_blocks = sum(each.free_blocks for each in tiers if each.tier == tier)
    return free_blocks * store.filesystem.block_size_bytes
