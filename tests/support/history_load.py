"""Performs a ``History`` through a client, and looks at what there is."""

from __future__ import annotations

from collections.abc import Callable

from crailfs.client.store import CrailStore
from crailfs.errors import BlockLostError, ChecksumError
from crailfs.records import NodeKind
from tests.support.history import History, Kind, Observed, Step


async def make_directories(store: CrailStore, top: str, classes: dict[str, str]) -> None:
    """Directory ``top`` with one directory for each storage class; durable."""
    await store.mkdir(top)
    for name, storage_class in classes.items():
        await store.mkdir(f"{top}/{name}")
        await store.set_class(f"{top}/{name}", storage_class)
    await store.filesystem.sync()


async def perform(
    store: CrailStore, top: str, history: History, acknowledge: Callable[[Step], bool]
) -> None:
    """Step after step; each is applied and acknowledged when it has returned. ``acknowledge`` says
    whether to go on."""
    goes_on = True
    while goes_on:
        step = history.next_step()
        await _do(store, top, history, step)
        history.apply(step)
        goes_on = acknowledge(step)


async def observe(store: CrailStore, top: str) -> dict[str, Observed]:
    """Every file below ``top``, block by block, errors of single blocks included."""
    found = {}
    for directory in await store.list(top):
        for entry in await store.list(f"{top}/{directory.name}"):
            assert entry.attributes.kind is NodeKind.FILE
            name = f"{directory.name}/{entry.name}"
            found[name] = await _observe_file(store, f"{top}/{name}")
    return found


async def _observe_file(store: CrailStore, path: str) -> Observed:
    block_size_bytes = store.filesystem.block_size_bytes
    async with await store.open(path) as file:
        blocks: list[bytes | None] = []
        for offset in range(0, file.size, block_size_bytes):
            try:
                block = await file.read_at(offset, block_size_bytes)
                assert len(block) == min(block_size_bytes, file.size - offset)
                blocks.append(block)
            except (ChecksumError, BlockLostError):
                blocks.append(None)
        return Observed(file.size, tuple(blocks))


async def _do(store: CrailStore, top: str, history: History, step: Step) -> None:
    path = f"{top}/{step.name}"
    match step.kind:
        case Kind.CREATE:
            async with await store.create(path, exclusive=True):
                pass
        case Kind.RENAME:
            await store.rename(path, f"{top}/{step.new_name}")
        case Kind.DELETE:
            await store.delete(path)
        case Kind.TRUNCATE:
            async with await store.open(path) as file:
                await file.truncate(step.length)
        case Kind.SYNC:
            async with await store.open(path) as file:
                await file.sync()
        case Kind.WRITE:
            async with await store.open(path) as file:
                await file.write_at(step.offset, history.content(step))
                await (file.sync() if step.is_durable else file.flush())
