"""The state machine on its own: any bytes, any division of them, within its limits or an error."""

from __future__ import annotations

import random
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crailfs.errors import CrailError, ProtocolError, VersionError
from crailfs.limits import (
    BODY_MAX_BYTES,
    HANDSHAKE_BODY_MAX_BYTES,
    HEADER_BYTES,
    PAYLOAD_MAX_BYTES,
    PROTOCOL_VERSION,
)
from crailfs.wire.connection import NEED_DATA, PAYLOAD_RECEIVED, Connection, Frame
from crailfs.wire.header import ERROR, MAGIC_BYTES, PUSH, REPLY, pack_header


def trusted() -> Connection:
    connection = Connection()
    connection.authenticated()
    return connection


def frame(
    body: bytes, payload: bytes = b"", *, code: int = 20, request_id: int = 1, flags: int = 0
) -> bytes:
    return pack_header(flags, code, request_id, len(body), len(payload)) + body + payload


def collect(connection: Connection, chunks: list[bytes]) -> list[tuple[Frame, bytes]]:
    """Every frame with its payload, received partly into the space that the machine names."""
    frames: list[tuple[Frame, bytearray]] = []
    for chunk in chunks:
        rest = memoryview(chunk)
        while True:
            space = connection.payload_space()
            if space is not None and rest:
                count = min(len(space), len(rest))
                space[:count] = rest[:count]
                connection.payload_written(count)
                rest = rest[count:]
            else:
                connection.receive_data(rest)
                rest = rest[len(rest) :]
            while (event := connection.next_event()) is not NEED_DATA:
                if isinstance(event, Frame):
                    frames.append((event, bytearray(event.payload_bytes)))
                    if event.payload_bytes:
                        connection.receive_payload(memoryview(frames[-1][1]))
                else:
                    assert event is PAYLOAD_RECEIVED
            if not rest:
                break
    return [(event, bytes(payload)) for event, payload in frames]


@given(
    st.lists(st.tuples(st.binary(max_size=300), st.binary(max_size=300)), max_size=5),
    st.integers(0, 2**32),
)
def test_any_division_gives_the_same_frames(messages: list[tuple[bytes, bytes]], seed: int) -> None:
    stream = b"".join(frame(b, p, request_id=i) for i, (b, p) in enumerate(messages))
    rng = random.Random(seed)
    cuts = sorted(rng.randrange(len(stream) + 1) for _ in range(rng.randrange(10)))
    chunks = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    connection = trusted()
    got = collect(connection, chunks)
    assert [(bytes(f.body), payload) for f, payload in got] == messages
    assert [f.request_id for f, _ in got] == list(range(len(messages)))
    assert not connection.mid_frame
    assert connection.frames_completed == len(messages)


@given(st.binary(max_size=200))
def test_random_bytes_are_frames_or_an_error(data: bytes) -> None:
    for connection in (Connection(), trusted()):
        connection.receive_data(data)
        try:
            while (event := connection.next_event()) is not NEED_DATA:
                if isinstance(event, Frame) and event.payload_bytes:
                    connection.receive_payload(None)
        except CrailError as error:
            assert isinstance(error, ProtocolError | VersionError)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 23, 24])
def test_another_magic_is_refused_at_its_first_wrong_byte(length: int) -> None:
    connection = Connection()
    connection.receive_data(b"GET / HTTP/1.1\r\nHost: example\r\n"[:length])
    with pytest.raises(ProtocolError, match="does not speak"):
        connection.next_event()


def test_a_good_beginning_is_waited_on() -> None:
    connection = Connection()
    for byte in MAGIC_BYTES:
        connection.receive_data(bytes([byte]))
        assert connection.next_event() is NEED_DATA


def test_another_version_is_named() -> None:
    data = bytearray(frame(b""))
    data[4] = PROTOCOL_VERSION + 1
    connection = Connection()
    connection.receive_data(data)
    with pytest.raises(VersionError, match=rf"version {PROTOCOL_VERSION + 1}, this side"):
        connection.next_event()


@pytest.mark.parametrize("flags", [8, 0x80, 0xFF, ERROR, PUSH | ERROR])
def test_impossible_flags_are_refused(flags: int) -> None:
    connection = Connection()
    connection.receive_data(frame(b"", flags=flags))
    with pytest.raises(ProtocolError, match="flags"):
        connection.next_event()


@pytest.mark.parametrize("flags", [0, REPLY, PUSH, REPLY | PUSH, REPLY | ERROR])
def test_possible_flags_are_taken(flags: int) -> None:
    connection = Connection()
    connection.receive_data(frame(b"", flags=flags))
    assert isinstance(connection.next_event(), Frame)


@pytest.mark.parametrize(
    ("authenticated", "body_bytes", "payload_bytes"),
    [
        (False, HANDSHAKE_BODY_MAX_BYTES + 1, 0),
        (False, 0, 1),
        (True, BODY_MAX_BYTES + 1, 0),
        (True, 0, PAYLOAD_MAX_BYTES + 1),
        (True, 2**32 - 1, 2**32 - 1),
    ],
)
def test_lengths_are_refused_from_the_header_alone(
    authenticated: bool, body_bytes: int, payload_bytes: int
) -> None:
    connection = trusted() if authenticated else Connection()
    connection.receive_data(pack_header(0, 1, 1, body_bytes, payload_bytes))
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError, match="announces"):
            connection.next_event()
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("authenticated", "body_bytes"),
    [(False, HANDSHAKE_BODY_MAX_BYTES), (True, BODY_MAX_BYTES)],
)
def test_the_largest_body_is_taken(authenticated: bool, body_bytes: int) -> None:
    connection = trusted() if authenticated else Connection()
    data = frame(bytes(body_bytes))
    for start in range(0, len(data), connection.receive_max_bytes):
        assert connection.next_event() is NEED_DATA
        connection.receive_data(data[start : start + connection.receive_max_bytes])
    event = connection.next_event()
    assert isinstance(event, Frame) and len(event.body) == body_bytes


def test_a_payload_goes_straight_into_its_target() -> None:
    connection = trusted()
    target = bytearray(10)
    connection.receive_data(frame(b"body", bytes(range(10)))[: HEADER_BYTES + 4 + 3])
    event = connection.next_event()
    assert isinstance(event, Frame) and event.payload_bytes == 10
    connection.receive_payload(memoryview(target))
    assert connection.next_event() is NEED_DATA
    space = connection.payload_space()
    assert space is not None and len(space) == 7
    space[:] = bytes(range(3, 10))
    connection.payload_written(7)
    assert connection.next_event() is PAYLOAD_RECEIVED
    assert target == bytes(range(10))
    assert connection.payload_space() is None


def test_a_dropped_payload_is_skipped_and_the_next_frame_found() -> None:
    connection = trusted()
    connection.receive_data(frame(b"", b"x" * 100) + frame(b"next"))
    assert isinstance(connection.next_event(), Frame)
    connection.receive_payload(None)
    assert connection.next_event() is PAYLOAD_RECEIVED
    event = connection.next_event()
    assert isinstance(event, Frame) and event.body == b"next"


def test_a_target_that_is_given_up_is_not_written_to_any_more() -> None:
    connection = trusted()
    target = bytearray(10)
    data = frame(b"", b"y" * 10)
    connection.receive_data(data[:-6])
    connection.next_event()
    connection.receive_payload(memoryview(target))
    assert connection.next_event() is NEED_DATA
    connection.discard_payload()
    assert connection.payload_space() is None
    connection.receive_data(data[-6:])
    assert connection.next_event() is PAYLOAD_RECEIVED
    assert target == b"y" * 4 + bytes(6)


def test_a_target_of_another_length_is_refused() -> None:
    connection = trusted()
    connection.receive_data(frame(b"", b"z" * 10))
    connection.next_event()
    with pytest.raises(ValueError, match="10 bytes, target of 9"):
        connection.receive_payload(memoryview(bytearray(9)))
