"""A client whose server goes away, comes back, or does not want it."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trio.testing

from crailfs.config import Credentials
from crailfs.errors import (
    AuthenticationError,
    FencedError,
    NotFoundError,
    TryAgainError,
    UnavailableError,
    VersionError,
)
from crailfs.net import client as client_module
from crailfs.net.server import Peer
from crailfs.wire.header import pack_header
from crailfs.wire.messages import (
    Challenge,
    Empty,
    GetStatus,
    Invalidate,
    Lookup,
    Opcode,
    ReadBlocks,
    Role,
    SyncMetadata,
    Welcome,
    WriteBlocks,
)
from tests.net.serving import (
    CREDENTIALS,
    LOOKUP,
    Handler,
    attributes,
    connected_client,
    never,
    request_ids,
    serving,
    until,
)


async def test_a_call_waits_for_a_server_that_is_not_there_yet(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/s"
    got: list[Any] = []
    async with connected_client(address) as client, trio.open_nursery() as nursery:

        async def look_up() -> None:
            got.append(await client.call(Opcode.LOOKUP, LOOKUP))

        nursery.start_soon(look_up)
        await trio.testing.wait_all_tasks_blocked()
        assert not client.connected
        async with serving(Handler(), address):
            await until(lambda: bool(got))
    assert got == [attributes(1)]


async def test_without_a_server_a_call_ends_at_its_deadline_and_says_why(tmp_path: Path) -> None:
    async with connected_client(f"unix:{tmp_path}/s") as client:
        began = time.monotonic()
        with pytest.raises(UnavailableError, match=r"LOOKUP within 100 ms .*No such file"):
            await client.call(Opcode.LOOKUP, LOOKUP, deadline_ms=100)
        assert 0.1 <= time.monotonic() - began < 2


async def test_unanswered_requests_are_sent_again_once_a_connection_with_their_ids(
    tmp_path: Path,
) -> None:
    address = f"unix:{tmp_path}/s"
    rounds = 3
    seen: list[list[int]] = []
    async with connected_client(address) as client, trio.open_nursery() as nursery:
        got: list[int] = []

        async def look_up(parent: int) -> None:
            reply: Any = await client.call(Opcode.LOOKUP, Lookup(parent, b"n"))
            got.append(reply.ino)

        for _ in range(rounds):
            handler = Handler()
            handler.answers[Opcode.LOOKUP] = never
            async with serving(handler, address):
                await client.call(Opcode.SYNC_METADATA, SyncMetadata())
                if not seen:
                    for parent in range(5):
                        nursery.start_soon(look_up, parent)
                await until(lambda h=handler: len(h.requests) >= 6)  # type: ignore[misc]
                await client.call(Opcode.SYNC_METADATA, SyncMetadata())
                lookups = [i for i, op in handler.requests if op is Opcode.LOOKUP]
                seen.append(sorted(lookups))
            assert not got
        async with serving(Handler(), address):
            await until(lambda: len(got) == 5)
        assert sorted(got) == list(range(5))
    assert seen == [seen[0]] * rounds, "the same ids, each exactly once"
    assert len(set(seen[0])) == 5


async def test_request_ids_grow_over_connections(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/s"
    ids: list[int] = []
    async with connected_client(address) as client:
        for _ in range(3):
            handler = Handler()
            async with serving(handler, address):
                for _ in range(4):
                    await client.call(Opcode.LOOKUP, LOOKUP)
            ids += request_ids(handler)
            assert client.completed_below == len(ids) + 1
    assert ids == list(range(1, 13))


async def test_answered_requests_are_not_sent_again(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/s"

    def not_found(*_: Any) -> None:
        raise NotFoundError("no")

    first, second = Handler(), Handler()
    first.answers[Opcode.GET_STATUS] = not_found
    async with connected_client(address) as client:
        async with serving(first, address):
            await client.call(Opcode.LOOKUP, LOOKUP)
            with pytest.raises(NotFoundError):
                await client.call(Opcode.GET_STATUS, GetStatus())
            first.answers[Opcode.LOOKUP] = never
            with pytest.raises(UnavailableError):
                await client.call(Opcode.LOOKUP, LOOKUP, deadline_ms=20)
        async with serving(second, address):
            await client.call(Opcode.SYNC_METADATA, SyncMetadata())
        assert [op for _, op in second.requests] == [Opcode.SYNC_METADATA]


async def test_payloads_are_sent_and_received_again(tmp_path: Path) -> None:
    """A connection that breaks in the middle of a payload, either way, costs nothing but time."""
    address = f"unix:{tmp_path}/s"
    size = 2 << 20
    data = bytes(range(256)) * (size >> 8)

    class BreaksInMidWrite(Handler):
        def payload_target(
            self, peer: Peer, opcode: Opcode, request: Any, byte_count: int
        ) -> memoryview:
            trio.lowlevel.current_trio_token().run_sync_soon(peer.close, "test")
            return super().payload_target(peer, opcode, request, byte_count)

    def half_a_reply(peer: Peer, request_id: int, *_: Any) -> None:
        peer.reply(request_id, Empty(), payload=bytes(size))
        peer.close("test")

    broken, good = BreaksInMidWrite(size), Handler(size)
    broken.answers[Opcode.READ_BLOCKS] = half_a_reply
    good.memory[:] = data
    into = bytearray(size)
    async with connected_client(address) as client, trio.open_nursery() as nursery:

        async def write() -> None:
            await client.call(Opcode.WRITE_BLOCKS, WriteBlocks(1, 0, 1), payload=data)

        async def read() -> None:
            request = ReadBlocks(1, 0, size)
            await client.call(Opcode.READ_BLOCKS, request, into=memoryview(into))

        async with serving(broken, address):
            await until(lambda: client.connected)
            nursery.start_soon(write)
            nursery.start_soon(read)
            await until(lambda: len(broken.gone) >= 2)
        async with serving(good, address):
            await until(lambda: not nursery.child_tasks)
    assert into == data
    assert good.memory == data


async def test_hooks_tell_of_each_connection(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/s"
    told: list[str] = []

    async def on_connected(welcome: Welcome, challenge: Challenge) -> None:
        # Calls work from here.
        await client.call(Opcode.LOOKUP, LOOKUP)
        told.append(f"epoch {challenge.server_epoch}, new {welcome.session_is_new}")

    hooks: dict[str, Any] = {
        "on_connected": on_connected,
        "on_disconnected": lambda: told.append("gone"),
    }
    async with connected_client(address, **hooks) as client:
        for epoch in (1, 2):
            async with serving(Handler(), address, epoch=epoch):
                await until(lambda n=epoch: len(told) == 2 * n - 1)  # type: ignore[misc]
            await until(lambda n=epoch: len(told) == 2 * n)  # type: ignore[misc]
    assert told == ["epoch 1, new True", "gone", "epoch 2, new True", "gone"]


async def test_an_error_of_on_connected_ends_that_connection_only(tmp_path: Path) -> None:
    attempts = 0

    async def on_connected(welcome: Welcome, challenge: Challenge) -> None:
        nonlocal attempts
        attempts += 1
        if attempts < 3:
            raise TryAgainError("not yet")

    handler = Handler()
    address = f"unix:{tmp_path}/s"
    async with (
        serving(handler, address),
        connected_client(address, on_connected=on_connected) as client,
    ):
        await until(lambda: attempts == 3)
        await client.call(Opcode.LOOKUP, LOOKUP)
        assert len(handler.gone) == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"secret": b"not the tests' secret"}, "does not know this cluster's secret"),
        ({"cluster_id": b"another cluster!"}, "belongs to cluster"),
    ],
)
async def test_strangers_are_told_so_at_once(change: dict[str, Any], words: str) -> None:
    handler = Handler()
    stranger: Credentials = msgspec.structs.replace(CREDENTIALS, **change)
    async with (
        serving(handler) as (address,),
        connected_client(address, credentials=stranger) as client,
    ):
        began = time.monotonic()
        for _ in range(2):
            with pytest.raises(AuthenticationError, match=words):
                await client.call(Opcode.LOOKUP, LOOKUP)
        assert time.monotonic() - began < 2, "not at the deadline of 30 s"
        assert not handler.peers and not handler.requests and not handler.gone


async def test_a_server_that_refuses_for_good_is_not_waited_for() -> None:
    handler = Handler()
    handler.refusal = FencedError("this client was cut off")
    async with serving(handler) as (address,), connected_client(address) as client:
        with pytest.raises(FencedError, match="cut off"):
            await client.call(Opcode.LOOKUP, LOOKUP)
        handler.refusal = None
        await until(lambda: client.connected)
        await client.call(Opcode.LOOKUP, LOOKUP)


async def test_a_server_that_refuses_for_now_is_waited_for() -> None:
    handler = Handler()
    handler.refusal = TryAgainError("starting")
    got: list[Any] = []
    async with serving(handler) as (address,), connected_client(address) as client:
        with pytest.raises(UnavailableError, match="starting"):
            await client.call(Opcode.LOOKUP, LOOKUP, deadline_ms=50)
        handler.refusal = None
        got.append(await client.call(Opcode.LOOKUP, LOOKUP))
    assert got == [attributes(1)]


async def test_a_server_of_another_version_is_named_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)

        async def other_version() -> None:
            while True:
                await trio.lowlevel.wait_readable(listener)
                with listener.accept()[0] as sock:
                    answer = bytearray(pack_header(5, 28, 0, 0, 0))
                    answer[4] = 9
                    sock.send(answer)
                    sock.shutdown(socket.SHUT_WR)
                    await trio.lowlevel.wait_readable(sock)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(other_version)
            port = listener.getsockname()[1]
            async with connected_client(f"127.0.0.1:{port}") as client:
                with pytest.raises(VersionError, match="version 9, this side 1"):
                    await client.call(Opcode.LOOKUP, LOOKUP)
            nursery.cancel_scope.cancel()


async def test_a_server_that_accepts_and_says_nothing_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client_module, "CONNECT_TIMEOUT_MS", 50)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        async with connected_client(address) as client:
            with pytest.raises(UnavailableError, match="no answer within 50 ms"):
                await client.call(Opcode.LOOKUP, LOOKUP, deadline_ms=200)


async def test_a_connection_without_a_word_for_a_whole_deadline_is_made_anew() -> None:
    """The server's host may have vanished without closing anything."""
    handler = Handler()
    handler.answers[Opcode.GET_STATUS] = never
    async with serving(handler) as (address,), connected_client(address) as client:
        await client.call(Opcode.LOOKUP, LOOKUP)
        with pytest.raises(UnavailableError):
            await client.call(Opcode.GET_STATUS, GetStatus(), deadline_ms=20)
        await until(lambda: len(handler.gone) == 1)
        await client.call(Opcode.LOOKUP, LOOKUP)


async def test_a_server_that_talks_nonsense_is_left_and_tried_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    handler = Handler()

    def nonsense(peer: Peer, *_: Any) -> None:
        peer.queue.append(b"nonsense, at least as long as a header")
        handler.answers.clear()
        peer.push(Opcode.INVALIDATE, Invalidate(()), lambda answer: None)

    handler.answers[Opcode.LOOKUP] = nonsense
    async with serving(handler) as (address,), connected_client(address) as client:
        assert await client.call(Opcode.LOOKUP, LOOKUP) == attributes(1)
        assert len(handler.gone) == 1
        assert [i for i, _ in handler.requests] == [1, 1], "sent again with its id"
    assert "does not speak CrailFS's protocol" in caplog.text


async def test_a_storm_of_restarts_loses_no_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "RECONNECT_DELAY_MAX_MS", 20)
    address = f"unix:{tmp_path}/s"
    answered = 0
    stop = False

    async with connected_client(address) as client, trio.open_nursery() as nursery:

        async def worker(index: int) -> None:
            nonlocal answered
            while not stop:
                reply: Any = await client.call(Opcode.LOOKUP, Lookup(index, b"n"))
                assert reply.ino == index
                answered += 1

        for index in range(8):
            nursery.start_soon(worker, index)
        for _ in range(10):
            async with serving(Handler(), address):
                goal = answered + 50
                await until(lambda n=goal: answered >= n)  # type: ignore[misc]
        stop = True
        async with serving(Handler(), address):
            await until(lambda: not nursery.child_tasks)


async def test_a_client_that_is_given_up_answers_its_callers_at_once(tmp_path: Path) -> None:
    client = client_module.RpcClient(
        f"unix:{tmp_path}/nobody", CREDENTIALS, role=Role.CLIENT, client_id=1
    )

    async def call() -> None:
        with pytest.raises(UnavailableError, match="given up"):
            await client.call(Opcode.LOOKUP, LOOKUP)

    running = trio.CancelScope()

    async def run() -> None:
        with running:
            await client.run()

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            nursery.start_soon(call)
            await trio.testing.wait_all_tasks_blocked()
            running.cancel()
        await call()
