"""Random operations of two clients with two handles each, against a dict of bytearrays.

A program is drawn first and then run in one trio loop. Writes of one client are seen at once by its
own handles, and by the other client after a commit: the model commits a client's open files before
the other one has its turn. At the end the metadata auditor must find nothing wrong.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import NamedTuple

import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from crailfs.client.store import CrailStore
from crailfs.client.stream import StoreFile
from crailfs.errors import NotFoundError
from crailfs.units import MIB
from tests.support.cluster import running_cluster

BLOCK = 4096


class Step(NamedTuple):
    action: str
    client: int
    slot: int
    name: str
    new_name: str
    offset: int
    data: bytes


STEPS = st.builds(
    Step,
    action=st.sampled_from(
        ("open", "open", "write", "write", "write", "append", "truncate", "read", "read", "flush",
         "close", "replace", "rename", "delete", "list")
    ),
    client=st.integers(0, 1),
    slot=st.integers(0, 1),
    name=st.sampled_from("abc"),
    new_name=st.sampled_from("abc"),
    offset=st.one_of(
        st.sampled_from((0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK)), st.integers(0, 5 * BLOCK)
    ),
    data=st.builds(
        lambda count, byte: bytes([byte]) * count,
        st.sampled_from((1, 10, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK)),
        st.integers(1, 255),
    ),
)  # fmt: skip


class Program:
    """Interprets steps on two stores and on the model."""

    def __init__(self, stores: tuple[CrailStore, CrailStore]) -> None:
        self.stores = stores
        self.names: dict[str, bytearray] = {}
        self.handles: dict[tuple[int, int], tuple[StoreFile, bytearray]] = {}
        self.last_client = 0

    async def run(self, step: Step) -> None:
        if step.client != self.last_client:
            await self._commit(self.last_client)
            self.last_client = step.client
        await getattr(self, step.action)(self.stores[step.client], step)

    async def _commit(self, client: int) -> None:
        for (owner, _), (file, _) in self.handles.items():
            if owner == client:
                await file.flush()

    async def open(self, store: CrailStore, step: Step) -> None:
        await self.close(store, step)
        content = self.names.get(step.name)
        if content is None:
            content = self.names[step.name] = bytearray()
            file = await store.create(step.name, exclusive=True)
        else:
            file = await store.open(step.name)
        self.handles[step.client, step.slot] = file, content

    async def close(self, store: CrailStore, step: Step) -> None:
        handle = self.handles.pop((step.client, step.slot), None)
        if handle is not None:
            await handle[0].close()

    async def write(self, store: CrailStore, step: Step) -> None:
        handle = self.handles.get((step.client, step.slot))
        if handle is None:
            return
        file, content = handle
        await file.write_at(step.offset, step.data)
        end = step.offset + len(step.data)
        content.extend(bytes(max(0, end - len(content))))
        content[step.offset : end] = step.data

    async def append(self, store: CrailStore, step: Step) -> None:
        handle = self.handles.get((step.client, step.slot))
        if handle is not None:
            file, content = handle
            assert await file.append(step.data) == len(content)
            content += step.data

    async def truncate(self, store: CrailStore, step: Step) -> None:
        handle = self.handles.get((step.client, step.slot))
        if handle is not None:
            file, content = handle
            await file.truncate(step.offset)
            content[step.offset :] = bytes(max(0, step.offset - len(content)))

    async def read(self, store: CrailStore, step: Step) -> None:
        handle = self.handles.get((step.client, step.slot))
        if handle is None:
            if step.name in self.names:
                assert await store.read(step.name) == self.names[step.name]
            else:
                assert not await store.exists(step.name)
            return
        file, content = handle
        expected = content[step.offset : step.offset + len(step.data)]
        assert await file.read_at(step.offset, len(step.data)) == expected
        assert await file.read_at(0, 1 << 30) == content

    async def flush(self, store: CrailStore, step: Step) -> None:
        await self._commit(step.client)

    async def replace(self, store: CrailStore, step: Step) -> None:
        await store.write(step.name, step.data)
        content = self.names.setdefault(step.name, bytearray())
        content[:] = step.data

    async def rename(self, store: CrailStore, step: Step) -> None:
        try:
            await store.rename(step.name, step.new_name)
        except NotFoundError:
            assert step.name not in self.names
        else:
            self.names[step.new_name] = self.names.pop(step.name)

    async def delete(self, store: CrailStore, step: Step) -> None:
        try:
            await store.delete(step.name)
        except NotFoundError:
            assert step.name not in self.names
        else:
            del self.names[step.name]

    async def list(self, store: CrailStore, step: Step) -> None:
        await self._commit(step.client)
        listed = {entry.name: entry.attributes.size for entry in await store.list("/")}
        assert listed == {name: len(content) for name, content in self.names.items()}

    async def end(self) -> None:
        await self._commit(self.last_client)
        for file, content in self.handles.values():
            assert await file.read_at(0, 1 << 30) == content
            await file.close()
        for store in self.stores:
            listed = {entry.name: await store.read(entry.name) for entry in await store.list("/")}
            assert listed == self.names


async def run_program(directory: Path, steps: list[Step], transports: tuple[str, str]) -> None:
    async with (
        running_cluster(
            directory, memory_bytes=1 * MIB, disk_bytes=4 * MIB, block_size_bytes=BLOCK
        ) as cluster,
        CrailStore.connect(cluster.client_config(transports[0])) as one,
        CrailStore.connect(cluster.client_config(transports[1])) as two,
    ):
        program = Program((one, two))
        for step in steps:
            await program.run(step)
        await program.end()


@settings(max_examples=60, deadline=None, print_blob=True)
@given(
    steps=st.lists(STEPS, min_size=5, max_size=50),
    transports=st.sampled_from((("local", "local"), ("local", "tcp"), ("tcp", "tcp"))),
)
def test_two_clients_against_the_model(steps: list[Step], transports: tuple[str, str]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        trio.run(run_program, Path(directory), steps, transports)
