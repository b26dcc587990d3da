"""The metadata server over real connections, in this process."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from crailfs.config import Credentials, MetadataConfig
from crailfs.errors import AuthenticationError, BusyError, CrailError, NoSpaceError
from crailfs.net.client import RpcClient
from crailfs.records import ANY_TIER, NodeKind, RegionInfo, StorageServerInfo, Tier
from crailfs.units import ROOT_INODE
from crailfs.wire.messages import (
    Audit,
    Challenge,
    CommitFile,
    CreateNode,
    GetAttributes,
    GrantBlocks,
    Invalidate,
    InvalidateReply,
    Lookup,
    Message,
    Opcode,
    ReadDirectory,
    RegionState,
    RegisterStorage,
    Role,
    SetAttributes,
    StorageHeartbeat,
    SyncMetadata,
    Welcome,
)
from metadata_server.driver import Driver
from metadata_server.handler import DEFAULT_TIMINGS
from metadata_server.server import Timings, serve

CREDENTIALS = Credentials(cluster_id=b"", secret=b"secret of a test")
BLOCK_SIZE_BYTES = 4096
QUICK = Timings(lease_ms=400, session_timeout_ms=800, storage_timeout_ms=5_000)

pytestmark = pytest.mark.timeout(20)


def config(tmp_path: Path) -> MetadataConfig:
    return MetadataConfig(
        state=tmp_path / "state",
        listen=(f"unix:{tmp_path}/meta",),
        credentials=CREDENTIALS,
        block_size_bytes=BLOCK_SIZE_BYTES,
    )


@contextlib.asynccontextmanager
async def running(tmp_path: Path, timings: Timings = DEFAULT_TIMINGS) -> AsyncIterator[str]:
    """A server; its address. Stopped cleanly, and then sound."""
    async with trio.open_nursery() as nursery:
        addresses = await nursery.start(partial(serve, config(tmp_path), timings=timings))
        yield addresses[0]
        nursery.cancel_scope.cancel()


class Client:
    """An ``RpcClient`` that answers pushes with ``on_push``, or with "nothing open"."""

    def __init__(self, address: str, client_id: int, role: Role = Role.CLIENT) -> None:
        self.on_push: Callable[[Invalidate], Awaitable[Message]] | None = None
        self.welcomes: list[bool] = []
        self.rpc = RpcClient(
            address,
            CREDENTIALS,
            role=role,
            client_id=client_id,
            on_push=self._pushed,
            on_connected=self._connected,
        )

    async def _pushed(self, opcode: Opcode, request: Message) -> Message:
        assert isinstance(request, Invalidate)
        return await self.on_push(request) if self.on_push else InvalidateReply(())

    async def _connected(self, welcome: Welcome, challenge: Challenge) -> None:
        self.welcomes.append(welcome.session_is_new)

    async def call(self, opcode: Opcode, request: Message) -> Any:
        return await self.rpc.call(opcode, request)

    async def create(self, name: bytes) -> int:
        request = CreateNode(ROOT_INODE, name, NodeKind.FILE, 0o644, 0, 0)
        ino: int = (await self.call(Opcode.CREATE_NODE, request)).attributes.ino
        return ino

    async def names(self) -> list[bytes]:
        page = await self.call(Opcode.READ_DIRECTORY, ReadDirectory(ROOT_INODE, b"", 100))
        return [entry.name for entry in page.entries]


@contextlib.asynccontextmanager
async def connected(
    address: str, client_id: int, role: Role = Role.CLIENT
) -> AsyncIterator[Client]:
    client = Client(address, client_id, role)
    async with trio.open_nursery() as nursery:
        await nursery.start(client.rpc.run)
        yield client
        nursery.cancel_scope.cancel()


async def assert_sound(address: str) -> dict[str, int]:
    async with connected(address, 1 << 40, Role.OPERATOR) as operator:
        reply = await operator.call(Opcode.AUDIT, Audit())
    assert reply.findings == ()
    counts: dict[str, int] = reply.counts
    return counts


async def add_storage(storage: Client, block_count: int) -> None:
    info = RegionInfo(b"r" * 16, Tier.MEMORY, BLOCK_SIZE_BYTES, block_count, False, "")
    server = StorageServerInfo(b"S" * 16, "host", "", "", "", 0, "")
    reply = await storage.call(Opcode.REGISTER_STORAGE, RegisterStorage(server, (info,)))
    states = (RegionState(reply.region_ids[0], block_count, ()),)
    await storage.call(Opcode.STORAGE_HEARTBEAT, StorageHeartbeat(server.id, states, ()))


async def test_two_clients_see_each_others_changes_in_order(tmp_path: Path) -> None:
    events: list[str] = []
    may_answer = trio.Event()
    asked = trio.Event()

    async def hold(request: Invalidate) -> Message:
        events.append("asked")
        asked.set()
        await may_answer.wait()
        events.append("answered")
        return InvalidateReply(())

    async with running(tmp_path) as address:
        async with connected(address, 1) as writer, connected(address, 2) as reader:
            ino = await writer.create(b"f")
            await reader.call(Opcode.LOOKUP, Lookup(ROOT_INODE, b"f"))
            reader.on_push = hold

            async def change() -> None:
                await writer.call(Opcode.SET_ATTRIBUTES, SetAttributes(ino, mode=0o600))
                events.append("acknowledged")

            async with trio.open_nursery() as nursery:
                nursery.start_soon(change)
                await asked.wait()
                # Neither connection is held up meanwhile.
                for client in (writer, reader):
                    node = await client.call(Opcode.GET_ATTRIBUTES, GetAttributes(ino))
                    assert node.mode == 0o600
                may_answer.set()
            assert events == ["asked", "answered", "acknowledged"]
        await assert_sound(address)


async def test_a_holder_that_never_answers_delays_a_change_by_a_lease(tmp_path: Path) -> None:
    async def never(request: Invalidate) -> Message:
        await trio.sleep_forever()
        raise AssertionError("unreachable")

    async with running(tmp_path, QUICK) as address:
        async with connected(address, 1) as writer, connected(address, 2) as reader:
            ino = await writer.create(b"f")
            await reader.call(Opcode.GET_ATTRIBUTES, GetAttributes(ino))
            reader.on_push = never
            started_s = trio.current_time()
            await writer.call(Opcode.SET_ATTRIBUTES, SetAttributes(ino, mode=0o600))
            assert QUICK.lease_ms / 1000 <= trio.current_time() - started_s < 5
            # The silent one was disconnected, and is back in its old session.
            assert await reader.names() == [b"f"]
            assert reader.welcomes == [True, False]
        await assert_sound(address)


async def test_blocks_of_a_client_that_vanished_come_back_after_fencing(tmp_path: Path) -> None:
    async with (
        running(tmp_path, QUICK) as address,
        connected(address, 9, Role.STORAGE_SERVER) as storage,
    ):
        await add_storage(storage, 10)
        async with connected(address, 1) as client:
            await client.call(Opcode.GRANT_BLOCKS, GrantBlocks(ANY_TIER, "", "", 10, 1))
        fence: tuple[int, ...] = ()
        while not fence:
            await trio.sleep(0.02)
            heartbeat = StorageHeartbeat(b"S" * 16, (), ())
            fence = (await storage.call(Opcode.STORAGE_HEARTBEAT, heartbeat)).fence
        assert fence == (1,)
        assert (await assert_sound(address)).get("free_blocks", 0) == 0
        heartbeat = StorageHeartbeat(b"S" * 16, (), fence)
        await storage.call(Opcode.STORAGE_HEARTBEAT, heartbeat)
        assert (await assert_sound(address))["free_blocks"] == 10


async def test_clients_go_on_over_a_restart(tmp_path: Path) -> None:
    async with running(tmp_path) as address:
        client = Client(address, 1)
    async with trio.open_nursery() as nursery:
        await nursery.start(client.rpc.run)
        done: list[bytes] = []
        reached = {goal: trio.Event() for goal in (15, 30, 60)}

        async def work() -> None:
            for number in range(60):
                await client.create(b"%02d" % number)
                done.append(b"%02d" % number)
                if len(done) in reached:
                    reached[len(done)].set()

        async with trio.open_nursery() as inner:
            inner.start_soon(work)
            for goal in reached.values():
                async with running(tmp_path):
                    await goal.wait()
        async with running(tmp_path) as address:
            assert await client.names() == done
            await assert_sound(address)
        nursery.cancel_scope.cancel()
    assert client.welcomes[0] and not any(client.welcomes[1:])


async def test_durable_replies_follow_a_sync_that_serves_all_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    syncs = 0
    fdatasync = os.fdatasync

    def counted(descriptor: int) -> None:
        nonlocal syncs
        syncs += 1
        fdatasync(descriptor)

    monkeypatch.setattr(os, "fdatasync", counted)
    async with running(tmp_path) as address, connected(address, 1) as client:
        ino = await client.create(b"f")
        before = syncs
        request = CommitFile(ino, (), (), 0, 0, durable=True)
        await client.call(Opcode.COMMIT_FILE, request)
        assert syncs > before
        before = syncs
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(client.call, Opcode.COMMIT_FILE, request)
            nursery.start_soon(client.call, Opcode.SYNC_METADATA, SyncMetadata())
        assert 1 <= syncs - before <= 4


async def test_a_database_that_cannot_grow_does_not_stop_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks that left files become free when it can."""
    failures = 0

    def fails(driver: Driver) -> None:
        nonlocal failures
        failures += 1
        raise NoSpaceError("the metadata server's database cannot grow")

    async with running(tmp_path) as address, connected(address, 1) as client:
        with monkeypatch.context() as patch:
            patch.setattr(Driver, "free_settled", fails)
            for _ in range(2):
                await client.call(Opcode.SYNC_METADATA, SyncMetadata())
        assert failures
        await client.create(b"f")
        await client.call(Opcode.SYNC_METADATA, SyncMetadata())


async def test_a_stop_is_clean_and_leaves_nothing_to_wait_for(tmp_path: Path) -> None:
    for number in range(3):
        async with running(tmp_path) as address, connected(address, 10 + number) as client:
            with trio.fail_after(2):
                await client.create(b"%d" % number)
                assert len(await client.names()) == number + 1


async def test_a_second_server_on_the_same_state_is_refused(tmp_path: Path) -> None:
    async with running(tmp_path):
        with pytest.raises(BusyError):
            await serve(config(tmp_path))


async def test_a_stranger_is_refused(tmp_path: Path) -> None:
    async with running(tmp_path) as address, trio.open_nursery() as nursery:
        stranger = RpcClient(
            address,
            Credentials(cluster_id=b"", secret=b"some other secret"),
            role=Role.CLIENT,
            client_id=5,
        )
        await nursery.start(stranger.run)
        with pytest.raises(AuthenticationError):
            await stranger.call(Opcode.GET_ATTRIBUTES, GetAttributes(ROOT_INODE))
        nursery.cancel_scope.cancel()


async def test_errors_reach_the_caller_with_their_class(tmp_path: Path) -> None:
    async with running(tmp_path) as address, connected(address, 1) as client:
        with pytest.raises(CrailError) as caught:
            await client.call(Opcode.GET_ATTRIBUTES, GetAttributes(4711))
        assert type(caught.value).__name__ == "StaleError"
        assert "4711" in caught.value.message
