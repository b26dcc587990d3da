"""Peers that send nonsense, nothing, or too slowly: each costs its own connection, a bounded
number of log lines and bounded memory, and no other client notices."""

from __future__ import annotations

import contextlib
import errno
import logging
import random
import socket
import tracemalloc
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio

from crailfs.config import Credentials
from crailfs.errors import AuthenticationError, CrailError
from crailfs.limits import (
    BODY_MAX_BYTES,
    HANDSHAKE_BODY_MAX_BYTES,
    PAYLOAD_MAX_BYTES,
    PROTOCOL_VERSION,
)
from crailfs.net import ratelimit
from crailfs.net import server as server_module
from crailfs.net.client import RpcClient
from crailfs.wire.codec import error_frame, reply_frame, request_frame
from crailfs.wire.handshake import ConnectingSide
from crailfs.wire.header import ERROR, PUSH, REPLY, pack_header
from crailfs.wire.messages import Empty, Hello, Lookup, Opcode, Proof, ReadBlocks, Role, WriteBlocks
from tests.net.serving import (
    CREDENTIALS,
    LOOKUP,
    Handler,
    attributes,
    connected_client,
    never,
    raw_peer,
    serving,
    until,
)

HELLO = ConnectingSide(CREDENTIALS, Role.CLIENT, 1).hello
HELLO_FRAME = request_frame(Opcode.HELLO, 0, HELLO)


def with_version(frame: bytes, version: int) -> bytes:
    return frame[:4] + bytes([version]) + frame[5:]


@contextlib.asynccontextmanager
async def server_and_witness(handler: Handler) -> AsyncIterator[tuple[str, RpcClient]]:
    """A server with a client that works before, during and after what the test does."""
    async with serving(handler) as (address,), connected_client(address) as witness:
        await witness.call(Opcode.LOOKUP, LOOKUP)
        peer = handler.peers[0]

        async def work() -> None:
            while True:
                assert await witness.call(Opcode.LOOKUP, Lookup(3, b"n")) == attributes(3)
                await trio.sleep(0.001)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(work)
            yield address, witness
            nursery.cancel_scope.cancel()
        assert await witness.call(Opcode.LOOKUP, LOOKUP) == attributes(1)
        assert handler.peers[0] is peer, "the witness kept its connection"


STRANGERS_NONSENSE: dict[str, bytes] = {
    "a browser": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "zeros": bytes(100),
    "another magic": b"CRLG" + HELLO_FRAME[4:],
    "impossible flags": pack_header(0x40, 1, 0, 0, 0),
    "a reply": reply_frame(0, Empty()),
    "a push": pack_header(PUSH, 1, 0, 0, 0),
    "an error": error_frame(0, CrailError("x")),
    "a huge body": pack_header(0, 1, 0, 2**32 - 1, 0),
    "a body too large for a stranger": pack_header(0, 1, 0, HANDSHAKE_BODY_MAX_BYTES + 1, 0),
    "a payload in the handshake": pack_header(0, 1, 0, 0, 1),
    "a request before the handshake": request_frame(Opcode.LOOKUP, 1, LOOKUP),
    "an unknown opcode": pack_header(0, 9_999, 0, 0, 0),
    "proof before hello": request_frame(Opcode.PROOF, 0, Proof(bytes(32))),
    "a wrong proof": HELLO_FRAME + request_frame(Opcode.PROOF, 0, Proof(bytes(32))),
    "hello twice": HELLO_FRAME * 2,
    "another role": pack_header(0, 1, 0, 3, 0) + b"\x92\x01\x63",
    "hello of no shape": pack_header(0, 1, 0, 1, 0) + b"\xc0",
    "a nonce too long": request_frame(
        Opcode.HELLO, 0, Hello(PROTOCOL_VERSION, Role.CLIENT, 1, bytes(1_000), b"")
    ),
    "a negative client id": request_frame(
        Opcode.HELLO, 0, Hello(PROTOCOL_VERSION, Role.CLIENT, -1, bytes(32), b"")
    ),
    "another version": with_version(HELLO_FRAME, PROTOCOL_VERSION + 1),
    "another version in hello": request_frame(
        Opcode.HELLO, 0, Hello(PROTOCOL_VERSION + 1, Role.CLIENT, 1, bytes(32), b"")
    ),
}


@pytest.mark.parametrize("name", STRANGERS_NONSENSE)
async def test_a_strangers_nonsense_ends_its_connection_with_one_line(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    handler = Handler()
    async with server_and_witness(handler) as (address, _), raw_peer(address) as raw:
        caplog.clear()
        await raw.send(STRANGERS_NONSENSE[name])
        assert await raw.is_cut_off()
        assert len(handler.peers) == 1 and not handler.gone
        lines = [record.message for record in caplog.records]
        assert len(lines) == 1 and "127.0.0.1:" in lines[0], lines


async def test_a_client_of_another_version_is_told() -> None:
    async with serving(Handler()) as (address,), raw_peer(address) as raw:
        await raw.send(with_version(HELLO_FRAME, PROTOCOL_VERSION + 1))
        frame = await raw.next_frame()
        assert frame.flags == REPLY | ERROR and frame.code == 28


KNOWN_PEERS_NONSENSE: dict[str, bytes] = {
    "another magic": b"XXXX" + request_frame(Opcode.LOOKUP, 1, LOOKUP)[4:],
    "another version": with_version(request_frame(Opcode.LOOKUP, 1, LOOKUP), 9),
    "a huge body": pack_header(0, 20, 1, BODY_MAX_BYTES + 1, 0),
    "a huge payload": pack_header(0, 82, 1, 0, PAYLOAD_MAX_BYTES + 1),
    "a body of no shape": pack_header(0, 20, 1, 1, 0) + b"\xc0",
    "a payload where none belongs": request_frame(Opcode.LOOKUP, 1, LOOKUP, payload_bytes=1) + b"x",
    "an answer to no push": reply_frame(77, Empty(), flags=PUSH),
    "a reply": reply_frame(1, Empty()),
    "the same request twice": request_frame(Opcode.SYNC_METADATA, 5, Empty()) * 2,
    "hello again": HELLO_FRAME,
}


@pytest.mark.parametrize("name", KNOWN_PEERS_NONSENSE)
async def test_a_known_peers_nonsense_ends_its_connection_with_one_line(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    handler = Handler()
    handler.answers[Opcode.SYNC_METADATA] = never
    async with (
        server_and_witness(handler) as (address, _),
        raw_peer(address, handshake=True) as raw,
    ):
        caplog.clear()
        await raw.send(KNOWN_PEERS_NONSENSE[name])
        if name == "hello again":
            assert (await raw.next_frame()).flags & ERROR  # an operation that is not offered
            return
        assert await raw.is_cut_off()
        await until(lambda: len(handler.gone) == 1)
        lines = [record.message for record in caplog.records]
        assert len(lines) == 1 and "client 0000000000000009" in lines[0], lines


@pytest.mark.parametrize("seed", range(5))
async def test_random_bytes_and_damaged_frames_hurt_nobody(seed: int) -> None:
    """Seeded; half of the attackers know the secret."""
    rng = random.Random(seed)
    handler = Handler()
    frames = [
        request_frame(Opcode.LOOKUP, 1, LOOKUP),
        request_frame(Opcode.READ_BLOCKS, 2, ReadBlocks(1, 0, 100)),
        request_frame(Opcode.WRITE_BLOCKS, 3, WriteBlocks(1, 0, 1), payload_bytes=50) + bytes(50),
        HELLO_FRAME,
    ]
    async with server_and_witness(handler) as (address, _):

        async def attack(data: bytes, known: bool) -> None:
            with contextlib.suppress(OSError, EOFError):
                async with raw_peer(address, handshake=known) as raw:
                    await raw.send(data)
                    if rng.random() < 0.5:
                        with trio.move_on_after(0.01):
                            await raw.is_cut_off()

        for _ in range(40):
            data = bytearray(b"".join(rng.choices(frames, k=rng.randrange(1, 6))))
            for _ in range(rng.randrange(4)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            if rng.random() < 0.3:
                data = bytearray(rng.randbytes(rng.randrange(1, 5_000)))
            cut = rng.randrange(1, len(data) + 1) if rng.random() < 0.5 else len(data)
            await attack(bytes(data[:cut]), rng.random() < 0.5)
        await until(lambda: len(handler.peers) == 1)


@pytest.mark.parametrize("known", [False, True])
async def test_a_peer_that_ends_in_mid_frame_leaves_nothing(
    known: bool, caplog: pytest.LogCaptureFixture
) -> None:
    handler = Handler()
    write = request_frame(Opcode.WRITE_BLOCKS, 3, WriteBlocks(1, 0, 1), payload_bytes=50)
    async with server_and_witness(handler) as (address, _):
        for cut in (1, 23, 24, 30, len(write) + 20):
            caplog.clear()
            async with raw_peer(address, handshake=known) as raw:
                await raw.send(((write if known else HELLO_FRAME) + bytes(50))[:cut])
            if cut < 30:
                await until(lambda: "mid-frame" in caplog.text)
        await until(lambda: len(handler.peers) == 1)
        assert all(opcode is Opcode.LOOKUP for _, opcode in handler.requests)


@pytest.mark.parametrize(
    ("known", "first"),
    [
        (False, b""),
        (False, HELLO_FRAME[:10]),
        (True, request_frame(Opcode.LOOKUP, 1, LOOKUP)[:-1]),
        (True, request_frame(Opcode.WRITE_BLOCKS, 1, WriteBlocks(1, 0, 1), payload_bytes=9) + b"x"),
    ],
)
async def test_who_stalls_is_cut_off(
    known: bool, first: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server_module, "HANDSHAKE_TIMEOUT_MS", 200)
    monkeypatch.setattr(server_module, "FRAME_TIMEOUT_MS", 200)
    monkeypatch.setattr(server_module, "DEADLINE_CHECK_S", 0.02)
    handler = Handler()
    async with (
        server_and_witness(handler) as (address, _),
        raw_peer(address, handshake=known) as raw,
    ):
        await raw.send(first)
        with trio.fail_after(5):
            assert await raw.is_cut_off()
        assert "within 200 ms" in caplog.text


async def test_a_slow_drip_is_cut_off_though_it_never_pauses_for_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server_module, "FRAME_TIMEOUT_MS", 200)
    monkeypatch.setattr(server_module, "DEADLINE_CHECK_S", 0.02)
    handler = Handler()
    frame = request_frame(Opcode.LOOKUP, 1, Lookup(1, b"n" * 200))
    async with (
        server_and_witness(handler) as (address, _),
        raw_peer(address, handshake=True) as raw,
        trio.open_nursery() as nursery,
    ):

        async def drip() -> None:
            for byte in frame[:-1]:
                await raw.send(bytes([byte]))
                await trio.sleep(0.02)

        nursery.start_soon(drip)
        with trio.fail_after(3):
            assert await raw.is_cut_off()
        nursery.cancel_scope.cancel()


async def test_a_steady_client_is_not_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each read may end in mid-frame, as long as each frame is complete in time."""
    monkeypatch.setattr(server_module, "FRAME_TIMEOUT_MS", 100)
    monkeypatch.setattr(server_module, "DEADLINE_CHECK_S", 0.01)
    handler = Handler()
    async with serving(handler) as (address,), raw_peer(address, handshake=True) as raw:
        stream = b"".join(request_frame(Opcode.LOOKUP, i, LOOKUP) for i in range(40))
        step = len(stream) // 39  # not a whole number of frames
        for start in range(0, len(stream), step):
            await raw.send(stream[start : start + step])
            await trio.sleep(0.01)
        await until(lambda: len(handler.requests) == 40)
        await trio.sleep(0.2)  # idle between frames, longer than the limit of one
        await raw.send(request_frame(Opcode.LOOKUP, 41, LOOKUP))
        await until(lambda: len(handler.requests) == 41)


async def test_who_takes_no_reply_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "FRAME_TIMEOUT_MS", 200)
    monkeypatch.setattr(server_module, "DEADLINE_CHECK_S", 0.02)
    handler = Handler()
    frames = [request_frame(Opcode.READ_BLOCKS, i, ReadBlocks(1, 0, 1 << 20)) for i in range(50)]
    async with (
        server_and_witness(handler) as (address, _),
        raw_peer(address, handshake=True) as raw,
    ):
        await raw.send(b"".join(frames))
        await until(lambda: len(handler.gone) == 1)


@pytest.mark.timeout(60)
async def test_a_thousand_silent_connections(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server_module, "HANDSHAKE_TIMEOUT_MS", 1_000)
    handler = Handler()
    async with contextlib.AsyncExitStack() as stack:
        address, _ = await stack.enter_async_context(server_and_witness(handler))
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            silent = [await stack.enter_async_context(raw_peer(address)) for _ in range(1_000)]
            async with connected_client(address) as newcomer:
                await newcomer.call(Opcode.LOOKUP, LOOKUP)
            held_bytes = tracemalloc.get_traced_memory()[0] - before
        finally:
            tracemalloc.stop()
        assert held_bytes / len(silent) < 10_000, "both ends of a connection"
        for raw in silent:
            assert await raw.is_cut_off()
    faults = [record for record in caplog.records if record.name == "crailfs.net.server"]
    assert 0 < len(faults) <= ratelimit.LINES_PER_PERIOD + 2


async def test_when_strangers_fill_the_place_the_one_silent_for_longest_goes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server_module, "UNAUTHENTICATED_CONNECTIONS_MAX", 5)
    handler = Handler()
    async with (
        contextlib.AsyncExitStack() as stack,
        server_and_witness(handler) as (address, _),
    ):
        silent = [await stack.enter_async_context(raw_peer(address)) for _ in range(5)]
        async with connected_client(address) as newcomer:
            await newcomer.call(Opcode.LOOKUP, LOOKUP)
        assert await silent[0].is_cut_off()


async def test_beyond_all_connections_newcomers_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server_module, "CONNECTIONS_MAX", 3)
    handler = Handler()
    async with (
        server_and_witness(handler) as (address, _),
        raw_peer(address, handshake=True),
    ):
        async with raw_peer(address, handshake=True), raw_peer(address) as fourth:
            assert await fourth.is_cut_off()
        await until(lambda: len(handler.peers) == 2)
        async with raw_peer(address, handshake=True):
            assert len(handler.peers) == 3


async def test_a_server_out_of_descriptors_recovers(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server_module, "DEADLINE_CHECK_S", 0.02)
    real_accept = socket.socket.accept
    failures = 3

    def accept(self: socket.socket) -> Any:
        nonlocal failures
        if failures:
            failures -= 1
            raise OSError(errno.EMFILE, "Too many open files")
        return real_accept(self)

    handler = Handler()
    async with server_and_witness(handler) as (address, _):
        monkeypatch.setattr(socket.socket, "accept", accept)
        async with raw_peer(address, handshake=True):
            assert failures == 0
    assert "Too many open files" in caplog.text


async def test_a_thousand_faults_are_few_lines(caplog: pytest.LogCaptureFixture) -> None:
    async with serving(Handler()) as (address,):
        for _ in range(200):
            async with raw_peer(address) as raw:
                await raw.send(b"nonsense")
                assert await raw.is_cut_off()
    assert len(caplog.records) == ratelimit.LINES_PER_PERIOD


def test_the_lines_that_were_left_out_are_counted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 1_000.0
    monkeypatch.setattr(ratelimit.time, "monotonic", lambda: now)
    limited = ratelimit.LimitedLog(logging.getLogger("test"))
    for _ in range(ratelimit.LINES_PER_PERIOD + 5):
        limited.warning("bad peer")
    now += ratelimit.PERIOD_S
    limited.warning("another")
    lines = [record.message for record in caplog.records]
    assert lines[ratelimit.LINES_PER_PERIOD :] == [
        "5 more messages of this kind were left out",
        "another",
    ]


async def test_strangers_guessing_secrets_do_not_disturb(caplog: pytest.LogCaptureFixture) -> None:
    handler = Handler()
    wrong = Credentials(cluster_id=b"", secret=b"a guess of sixteen bytes")
    async with server_and_witness(handler) as (address, _):
        for _ in range(20):
            async with raw_peer(address) as raw:
                with pytest.raises(AuthenticationError):
                    await raw.handshake(wrong)
    assert all(opcode is Opcode.LOOKUP for _, opcode in handler.requests)
