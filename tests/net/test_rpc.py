"""Calls, payloads, pushes and descriptors between one server and well-behaved clients."""

from __future__ import annotations

import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import trio

from crailfs import limits
from crailfs.errors import (
    BusyError,
    CrailError,
    InternalError,
    InvalidError,
    NameTooLongError,
    NotFoundError,
    NotSupportedError,
    ProtocolError,
    UnavailableError,
)
from crailfs.net.peer import OUTGOING_PAUSE_BYTES
from crailfs.net.server import Peer
from crailfs.wire.codec import request_frame
from crailfs.wire.messages import (
    AttachRegions,
    AttachReply,
    Audit,
    Empty,
    GetStatus,
    Invalidate,
    InvalidateReply,
    Invalidation,
    Lookup,
    Message,
    Opcode,
    ReadBlocks,
    ReleaseInodes,
    Role,
    SyncMetadata,
    WriteBlocks,
)
from tests.net.serving import (
    LOOKUP,
    Handler,
    attributes,
    both_kinds,
    connected_client,
    never,
    raw_peer,
    request_ids,
    serving,
    until,
)

INVALIDATE = Invalidate((Invalidation(5, b"name", False),))


async def test_calls_are_answered_on_both_kinds_of_socket(tmp_path: Path) -> None:
    handler = Handler()
    async with serving(handler, *both_kinds(tmp_path)) as addresses:
        assert addresses[0] == f"unix:{tmp_path}/socket"
        assert addresses[1].startswith("127.0.0.1:") and not addresses[1].endswith(":0")
        for address, is_local in zip(addresses, (True, False), strict=True):
            async with connected_client(address, client_id=2**64 - 1) as client:
                assert await client.call(Opcode.LOOKUP, Lookup(5, b"x")) == attributes(5)
                peer = handler.peers[0]
                assert (peer.client_id, peer.role) == (2**64 - 1, Role.CLIENT)
                assert peer.is_local is is_local
                assert "ffffffffffffffff" in peer.description
                assert client.connected
                assert client.completed_below == 2
            await until(lambda: not handler.peers)
    assert not (tmp_path / "socket").exists()


async def test_an_error_arrives_as_what_it_was() -> None:
    def refuse(peer: Peer, request_id: int, *_: Any) -> None:
        raise NotFoundError("no 'name' in inode 1")

    def refuse_later(peer: Peer, request_id: int, *_: Any) -> None:
        peer.reply_error(request_id, BusyError("busy"))

    handler = Handler()
    handler.answers = {Opcode.LOOKUP: refuse, Opcode.GET_STATUS: refuse_later}
    async with serving(handler) as (address,), connected_client(address) as client:
        with pytest.raises(NotFoundError, match="no 'name' in inode 1"):
            await client.call(Opcode.LOOKUP, LOOKUP)
        with pytest.raises(BusyError):
            await client.call(Opcode.GET_STATUS, GetStatus())
        await client.call(Opcode.SYNC_METADATA, SyncMetadata())
        assert client.completed_below == 4
        assert len(handler.peers) == 1, "one connection through all of it"


async def test_a_bug_in_the_server_costs_one_request(caplog: pytest.LogCaptureFixture) -> None:
    def bug(*_: Any) -> None:
        raise ZeroDivisionError("a bug")

    handler = Handler()
    handler.answers[Opcode.GET_STATUS] = bug
    async with serving(handler) as (address,), connected_client(address) as client:
        with pytest.raises(InternalError, match="GET_STATUS"):
            await client.call(Opcode.GET_STATUS, GetStatus())
        assert await client.call(Opcode.LOOKUP, LOOKUP) == attributes(1)
    assert "ZeroDivisionError: a bug" in caplog.text


async def test_what_the_server_does_not_take_is_answered_and_the_connection_stays() -> None:
    handler = Handler()
    async with serving(handler) as (address,), connected_client(address) as client:
        with pytest.raises(NotSupportedError, match="AUDIT"):
            await client.call(Opcode.AUDIT, Audit())
        with pytest.raises(NameTooLongError):
            await client.call(Opcode.LOOKUP, Lookup(1, b"n" * 256))
        with pytest.raises(InvalidError):
            await client.call(Opcode.LOOKUP, Lookup(-1, b"n"))
        with pytest.raises(InvalidError, match="split it"):
            await client.call(Opcode.LOOKUP, Lookup(1, bytes(limits.BODY_MAX_BYTES)))
        await client.call(Opcode.LOOKUP, LOOKUP)
        assert len(handler.peers) == 1 and not handler.gone
        assert [opcode for _, opcode in handler.requests] == [Opcode.LOOKUP]


async def test_a_body_of_another_shape_is_answered_and_ends_the_connection() -> None:
    handler = Handler()
    async with serving(handler) as (address,), connected_client(address) as client:
        with pytest.raises(ProtocolError, match="LOOKUP request"):
            await client.call(Opcode.LOOKUP, ReleaseInodes((1, 2)))
        await until(lambda: len(handler.gone) == 1)
        await client.call(Opcode.LOOKUP, LOOKUP)


async def test_replies_come_in_any_order() -> None:
    waiting: list[tuple[Peer, int, Lookup]] = []

    def later(peer: Peer, request_id: int, request: Lookup, _: Any) -> None:
        waiting.append((peer, request_id, request))

    handler = Handler()
    handler.answers[Opcode.LOOKUP] = later
    got: list[int] = []
    async with serving(handler) as (address,), connected_client(address) as client:

        async def look_up(parent: int) -> None:
            reply: Any = await client.call(Opcode.LOOKUP, Lookup(parent, b"n"))
            assert reply.ino == parent
            got.append(parent)

        async with trio.open_nursery() as nursery:
            for parent in range(50):
                nursery.start_soon(look_up, parent)
            await until(lambda: len(waiting) == 50)
            assert client.completed_below == 1
            random.Random(1).shuffle(waiting)
            for peer, request_id, request in waiting:
                peer.reply(request_id, attributes(request.parent))
        assert sorted(got) == list(range(50))
        assert client.completed_below == 51


async def test_replies_leave_after_the_batch_is_done() -> None:
    """What ``batch_done`` makes durable is so before any client hears of it."""
    order: list[str] = []

    class Recording(Handler):
        def request(self, peer: Peer, opcode: Opcode, request_id: int, *rest: Any) -> None:
            super().request(peer, opcode, request_id, *rest)
            order.append(f"handled {request_id}")

        def batch_done(self) -> None:
            if order and order[-1].startswith("handled"):
                order.append("done")

    async with serving(Recording()) as (address,), raw_peer(address, handshake=True) as peer:
        await peer.send(b"".join(request_frame(Opcode.LOOKUP, i, LOOKUP) for i in (1, 2, 3)))
        order.append(f"reply {(await peer.next_frame()).request_id}")
    assert order == ["handled 1", "handled 2", "handled 3", "done", "reply 1"]


@pytest.mark.parametrize("byte_count", [1, 4_096, 65_537, limits.PAYLOAD_MAX_BYTES])
async def test_payloads_travel_both_ways_straight_into_their_targets(
    tmp_path: Path, byte_count: int
) -> None:
    data = random.Random(byte_count).randbytes(byte_count)
    for kind in (0, 1):
        handler = Handler(limits.PAYLOAD_MAX_BYTES + 10)
        seen: list[memoryview | None] = []

        def answer(
            peer: Peer, request_id: int, request: Any, payload: Any, seen: list[Any] = seen
        ) -> None:
            seen.append(payload)
            peer.reply(request_id, Empty())

        handler.answers[Opcode.WRITE_BLOCKS] = answer
        async with (
            serving(handler, both_kinds(tmp_path)[kind]) as (address,),
            connected_client(address) as client,
        ):
            await client.call(Opcode.WRITE_BLOCKS, WriteBlocks(1, 10, 1), payload=data)
            assert handler.memory[10 : 10 + byte_count] == data
            assert seen[0] is not None and seen[0].obj is handler.memory.obj, "not copied"
            into = bytearray(byte_count)
            request = ReadBlocks(1, 10, byte_count)
            await client.call(Opcode.READ_BLOCKS, request, into=memoryview(into))
            assert into == data


async def test_many_payloads_at_once_do_not_mix() -> None:
    handler = Handler(8 << 20)
    block = 1 << 18

    async with serving(handler) as (address,), connected_client(address) as client:

        async def worker(index: int) -> None:
            data = random.Random(index).randbytes(block)
            into = memoryview(bytearray(block))
            for _ in range(3):
                await client.call(
                    Opcode.WRITE_BLOCKS, WriteBlocks(1, index * block, 1), payload=data
                )
                await client.call(
                    Opcode.READ_BLOCKS, ReadBlocks(1, index * block, block), into=into
                )
                assert into == data

        async with trio.open_nursery() as nursery:
            for index in range(32):
                nursery.start_soon(worker, index)


async def test_a_reply_may_be_of_several_pieces() -> None:
    def pieces(peer: Peer, request_id: int, *_: Any) -> None:
        peer.reply(request_id, Empty(), payload=[b"ab", memoryview(b"cd"), b"", bytearray(b"e")])

    handler = Handler()
    handler.answers[Opcode.READ_BLOCKS] = pieces
    async with serving(handler) as (address,), connected_client(address) as client:
        into = bytearray(5)
        await client.call(Opcode.READ_BLOCKS, ReadBlocks(1, 0, 5), into=memoryview(into))
        assert into == b"abcde"


async def test_a_refused_payload_is_dropped_and_the_connection_stays() -> None:
    class Refusing(Handler):
        def payload_target(self, *_: Any) -> memoryview:
            raise BusyError("not now")

    handler = Refusing()
    async with serving(handler) as (address,), connected_client(address) as client:
        for _ in range(3):
            with pytest.raises(BusyError):
                await client.call(Opcode.WRITE_BLOCKS, WriteBlocks(1, 0, 1), payload=bytes(1 << 20))
        await client.call(Opcode.LOOKUP, LOOKUP)
        assert len(handler.peers) == 1 and not handler.gone


async def test_a_reply_payload_of_another_length_is_an_error_not_data() -> None:
    handler = Handler()
    async with serving(handler) as (address,), connected_client(address) as client:
        into = memoryview(bytearray(100))
        with pytest.raises(ProtocolError, match="99 bytes instead of 100"):
            await client.call(Opcode.READ_BLOCKS, ReadBlocks(1, 0, 99), into=into)
        with pytest.raises(ProtocolError, match="without its payload"):
            await client.call(Opcode.LOOKUP, LOOKUP, into=into)
        await client.call(Opcode.LOOKUP, LOOKUP)


async def test_the_deadline_names_operation_and_address() -> None:
    handler = Handler()
    handler.answers[Opcode.GET_STATUS] = never
    async with serving(handler) as (address,), connected_client(address) as client:
        await client.call(Opcode.LOOKUP, LOOKUP)
        began = time.monotonic()
        with pytest.raises(UnavailableError, match=rf"{address} .*GET_STATUS within 50 ms"):
            await client.call(Opcode.GET_STATUS, GetStatus(), deadline_ms=50)
        assert 0.05 <= time.monotonic() - began < 2
        assert client.completed_below == 3, "a request that was given up is not waited for"
        await client.call(Opcode.LOOKUP, LOOKUP)


async def test_a_call_that_is_given_up_in_mid_payload_leaves_its_buffer_alone() -> None:
    held: list[tuple[Peer, int]] = []

    def half(peer: Peer, request_id: int, *_: Any) -> None:
        held.append((peer, request_id))

    handler = Handler()
    handler.answers[Opcode.READ_BLOCKS] = half
    size = 1 << 20
    async with serving(handler) as (address,), connected_client(address) as client:
        into = bytearray(size)
        with trio.CancelScope() as scope:

            async def cancel_in_mid_payload() -> None:
                await until(lambda: bool(held))
                peer, request_id = held[0]
                first = bytearray(b"\1") * size
                peer.reply(request_id, Empty(), payload=first)
                scope.cancel()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(cancel_in_mid_payload)
                await client.call(Opcode.READ_BLOCKS, ReadBlocks(1, 0, size), into=memoryview(into))
        into[:] = bytes(size)
        await client.call(Opcode.LOOKUP, LOOKUP)
        assert into == bytes(size), "nothing is written into it afterwards"
        assert len(handler.peers) == 1 and not handler.gone


async def test_a_push_is_answered_while_its_handler_makes_calls() -> None:
    answers: list[Message | CrailError] = []
    handler = Handler()
    async with serving(handler) as (address,):

        async def on_push(opcode: Opcode, request: Message) -> Message:
            assert (opcode, request) == (Opcode.INVALIDATE, INVALIDATE)
            await client.call(Opcode.LOOKUP, LOOKUP)
            return InvalidateReply((5,))

        async with connected_client(address, on_push=on_push) as client:
            await client.call(Opcode.LOOKUP, LOOKUP)
            for _ in range(10):
                handler.peers[0].push(Opcode.INVALIDATE, INVALIDATE, answers.append)
            await until(lambda: len(answers) == 10)
    assert answers == [InvalidateReply((5,))] * 10


async def test_a_push_begins_after_earlier_replies_have_reached_their_callers() -> None:
    """What a caller remembers of a reply must be there for the push that revokes it."""
    remembered: list[int] = []
    order: list[str] = []

    def reply_then_push(peer: Peer, request_id: int, request: Lookup, _: Any) -> None:
        peer.reply(request_id, attributes(request.parent))
        peer.push(Opcode.INVALIDATE, INVALIDATE, lambda answer: None)

    handler = Handler()
    handler.answers[Opcode.LOOKUP] = reply_then_push
    async with serving(handler) as (address,):

        async def on_push(opcode: Opcode, request: Message) -> Message:
            order.append(f"push {len(remembered)}")
            return InvalidateReply(())

        async with connected_client(address, on_push=on_push) as client:

            async def look_up() -> None:
                reply: Any = await client.call(Opcode.LOOKUP, LOOKUP)
                remembered.append(reply.ino)

            for round_number in range(1, 30):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(look_up)
                    nursery.start_soon(trio.lowlevel.checkpoint)
                await until(lambda n=round_number: len(order) == n)  # type: ignore[misc]
    assert order == [f"push {n}" for n in range(1, 30)]


async def test_a_push_that_the_client_cannot_answer_is_an_error_at_the_server(
    caplog: pytest.LogCaptureFixture,
) -> None:
    answers: list[Any] = []

    async def bug(opcode: Opcode, request: Message) -> Message:
        raise ZeroDivisionError("a bug")

    async def refusing(opcode: Opcode, request: Message) -> Message:
        raise BusyError("busy")

    for on_push in (None, bug, refusing):
        handler = Handler()
        async with (
            serving(handler) as (address,),
            connected_client(address, on_push=on_push) as client,
        ):
            await client.call(Opcode.LOOKUP, LOOKUP)
            handler.peers[0].push(Opcode.INVALIDATE, INVALIDATE, answers.append)
            expected = len(answers) + 1
            await until(lambda n=expected: len(answers) == n)  # type: ignore[misc]
            await client.call(Opcode.LOOKUP, LOOKUP)
    assert [type(answer) for answer in answers] == [NotSupportedError, InternalError, BusyError]
    assert "ZeroDivisionError: a bug" in caplog.text


async def test_pushes_without_an_answer_fail_once_when_the_connection_ends() -> None:
    answers: list[Any] = []
    handler = Handler()
    async with serving(handler) as (address,):
        async with raw_peer(address, handshake=True):
            peer = handler.peers[0]
            for _ in range(3):
                peer.push(Opcode.INVALIDATE, INVALIDATE, answers.append)
            assert not answers
        await until(lambda: handler.gone == [peer])
        assert [type(answer) for answer in answers] == [UnavailableError] * 3
        peer.push(Opcode.INVALIDATE, INVALIDATE, answers.append)
        assert len(answers) == 4 and isinstance(answers[3], UnavailableError)


async def test_a_client_that_answers_no_push_is_cut_off() -> None:
    answers: list[Any] = []
    handler = Handler()
    async with serving(handler) as (address,), raw_peer(address, handshake=True) as raw:
        peer = handler.peers[0]
        for _ in range(limits.REQUESTS_IN_FLIGHT_MAX + 1):
            peer.push(Opcode.INVALIDATE, INVALIDATE, answers.append)
        assert await raw.is_cut_off()
        await until(lambda: handler.gone == [peer])
        assert len(answers) == limits.REQUESTS_IN_FLIGHT_MAX + 1


@pytest.mark.parametrize("count", [1, 257])
async def test_descriptors_come_with_a_reply(tmp_path: Path, count: int) -> None:
    files = []
    for index in range(count):
        path = tmp_path / str(index)
        path.write_text(str(index))
        files.append(os.open(path, os.O_RDONLY))

    def attach(peer: Peer, request_id: int, *_: Any) -> None:
        peer.reply(request_id, AttachReply(()), fds=files)

    handler = Handler()
    handler.answers[Opcode.ATTACH_REGIONS] = attach
    async with (
        serving(handler, f"unix:{tmp_path}/socket") as (address,),
        connected_client(address) as client,
    ):

        async def attach_and_read() -> None:
            reply, fds = await client.call_with_fds(Opcode.ATTACH_REGIONS, AttachRegions(7))
            assert reply == AttachReply(())
            try:
                assert [os.pread(fd, 10, 0) for fd in fds] == [b"%d" % i for i in range(count)]
                assert not any(os.get_inheritable(fd) for fd in fds)
            finally:
                for fd in fds:
                    os.close(fd)

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(attach_and_read)
                nursery.start_soon(client.call, Opcode.LOOKUP, LOOKUP)
    for fd in files:
        os.close(fd)  # raises if the server had closed what is not its own


async def test_no_descriptor_is_left_behind(tmp_path: Path) -> None:
    def attach_badly(peer: Peer, request_id: int, *_: Any) -> None:
        raise BusyError("no")

    with tempfile.TemporaryFile() as file:

        def attach(peer: Peer, request_id: int, *_: Any) -> None:
            peer.reply(request_id, AttachReply(()), fds=[file.fileno()] * 10)

        handler = Handler()
        async with (
            serving(handler, f"unix:{tmp_path}/socket") as (address,),
            connected_client(address) as client,
        ):
            await client.call(Opcode.LOOKUP, LOOKUP)
            before = len(os.listdir("/proc/self/fd"))
            handler.answers[Opcode.ATTACH_REGIONS] = attach_badly
            with pytest.raises(BusyError):
                await client.call_with_fds(Opcode.ATTACH_REGIONS, AttachRegions(7))
            handler.answers[Opcode.ATTACH_REGIONS] = attach
            await client.call(Opcode.ATTACH_REGIONS, AttachRegions(7))  # does not ask for them
            handler.answers[Opcode.ATTACH_REGIONS] = never
            with pytest.raises(UnavailableError):
                await client.call_with_fds(Opcode.ATTACH_REGIONS, AttachRegions(7), deadline_ms=10)
            await client.call(Opcode.LOOKUP, LOOKUP)
            assert len(os.listdir("/proc/self/fd")) == before


async def test_descriptors_are_not_offered_over_tcp() -> None:
    def attach(peer: Peer, request_id: int, *_: Any) -> None:
        peer.reply(request_id, AttachReply(()), fds=[0])

    handler = Handler()
    handler.answers[Opcode.ATTACH_REGIONS] = attach
    async with serving(handler) as (address,), connected_client(address) as client:
        with pytest.raises(InternalError):
            await client.call_with_fds(Opcode.ATTACH_REGIONS, AttachRegions(7))


async def test_a_peer_beyond_the_requests_in_flight_is_not_read_from() -> None:
    handler = Handler()
    handler.answers[Opcode.LOOKUP] = never
    most = limits.REQUESTS_IN_FLIGHT_MAX
    frames = [request_frame(Opcode.LOOKUP, i, LOOKUP) for i in range(1, most + 501)]
    async with (
        serving(handler) as (address,),
        raw_peer(address, handshake=True) as raw,
        connected_client(address) as other,
    ):
        await raw.send(b"".join(frames))
        await until(lambda: len(handler.requests) == most)
        await other.call(Opcode.SYNC_METADATA, SyncMetadata())
        assert len(handler.requests) == most + 1
        peer = handler.peers[0]
        for request_id in range(1, 101):
            peer.reply(request_id, attributes(1))
        await until(lambda: len(handler.requests) == most + 101)
        for request_id in request_ids(handler)[100:most]:
            peer.reply(request_id, attributes(1))
        await until(lambda: len(handler.requests) == most + 501)


async def test_a_client_keeps_within_the_requests_in_flight() -> None:
    held: list[tuple[Peer, int]] = []

    def hold(peer: Peer, request_id: int, *_: Any) -> None:
        held.append((peer, request_id))

    handler = Handler()
    handler.answers[Opcode.LOOKUP] = hold
    most = limits.REQUESTS_IN_FLIGHT_MAX
    async with (
        serving(handler) as (address,),
        connected_client(address) as client,
        trio.open_nursery() as nursery,
    ):
        for _ in range(most + 100):
            nursery.start_soon(client.call, Opcode.LOOKUP, LOOKUP)
        await until(lambda: len(held) == most)
        with pytest.raises(UnavailableError):
            await client.call(Opcode.LOOKUP, LOOKUP, deadline_ms=20)
        while len(handler.requests) < most + 100 or held:
            for peer, request_id in held:
                peer.reply(request_id, attributes(1))
            held.clear()
            await trio.lowlevel.checkpoint()


async def test_replies_to_a_peer_that_takes_none_are_bounded() -> None:
    """Such a peer is not read from, and everybody else is served."""
    handler = Handler()
    size = 1 << 18
    count = 400
    frames = [request_frame(Opcode.READ_BLOCKS, i, ReadBlocks(1, 0, size)) for i in range(count)]
    async with (
        serving(handler) as (address,),
        raw_peer(address, handshake=True) as raw,
        connected_client(address) as other,
    ):
        await raw.send(b"".join(frames))
        peer = handler.peers[0]
        await until(lambda: peer.paused)
        for _ in range(100):
            await other.call(Opcode.LOOKUP, LOOKUP)
            assert peer.queue.byte_count < OUTGOING_PAUSE_BYTES + size + 1_000
        assert len(handler.requests) < count
        received = 0
        expected = count * (size + limits.HEADER_BYTES + 1)
        while received < expected:
            received += len(await raw.receive())
        assert received == expected
        assert len(handler.requests) == count + 100


async def test_a_busy_client_does_not_starve_its_own_process() -> None:
    """Calls whose replies come at once pass the scheduler by, but not for long."""
    ticks = 0
    async with serving(Handler()) as (address,), connected_client(address) as client:

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(tick)
            end = time.monotonic() + 0.2
            while time.monotonic() < end:
                await client.call(Opcode.LOOKUP, LOOKUP)
            nursery.cancel_scope.cancel()
    assert ticks > 10


async def test_a_closed_peer_gets_its_replies_but_no_more_requests() -> None:
    def last(peer: Peer, request_id: int, *_: Any) -> None:
        peer.reply(request_id, attributes(1))
        peer.close("enough")

    handler = Handler()
    handler.answers[Opcode.LOOKUP] = last
    async with serving(handler) as (address,), raw_peer(address, handshake=True) as raw:
        await raw.send(b"".join(request_frame(Opcode.LOOKUP, i, LOOKUP) for i in (1, 2)))
        assert (await raw.next_frame()).request_id == 1
        assert await raw.is_cut_off()
        await until(lambda: len(handler.gone) == 1)
        assert request_ids(handler) == [1]
