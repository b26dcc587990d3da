"""The golden frames are what this code makes and understands."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from crailfs.errors import ERRORS_BY_CODE
from crailfs.wire.codec import (
    decode_error,
    decode_reply,
    decode_request,
    error_frame,
    reply_frame,
    request_frame,
)
from crailfs.wire.connection import NEED_DATA, PAYLOAD_RECEIVED, Connection, Frame
from crailfs.wire.header import ERROR, PUSH, REPLY
from crailfs.wire.messages import Opcode
from tests.vectors import regenerate
from tests.vectors.regenerate import FRAMES, HANDSHAKE, fields_of

VECTORS: list[dict[str, Any]] = json.loads(FRAMES.read_text())
by_name = pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["name"])


def received(data: bytes, *, step: int) -> tuple[Frame, bytes, Connection]:
    """The first frame of ``data`` and its payload, fed ``step`` bytes at a time."""
    connection = Connection()
    connection.authenticated()
    frame, payload = None, bytearray()
    for start in range(0, len(data), step):
        connection.receive_data(data[start : start + step])
        while True:
            event = connection.next_event()
            if event is NEED_DATA:
                break
            if event is PAYLOAD_RECEIVED:
                return frame, bytes(payload), connection  # type: ignore[return-value]
            assert isinstance(event, Frame)
            frame = event
            if not event.payload_bytes:
                connection.receive_data(data[start + step :])
                return frame, b"", connection
            payload = bytearray(event.payload_bytes)
            connection.receive_payload(memoryview(payload))
    raise AssertionError("the frame is not complete")


def check(vector: dict[str, Any], frame: Frame, payload: bytes) -> None:
    assert frame.flags == vector["flags"]
    assert frame.request_id == vector["request_id"]
    assert payload.hex() == vector["payload"]
    if frame.flags & ERROR:
        error = decode_error(frame.code, frame.body)
        assert (error.wire_code, error.message) == (vector["status"], vector["text"])
        assert type(error) is ERRORS_BY_CODE[vector["status"]]
        return
    opcode = Opcode(vector["opcode"])
    if frame.flags & REPLY:
        assert frame.code == 0
        message = decode_reply(opcode, frame.body)
    else:
        assert frame.code == opcode
        message = decode_request(opcode, frame.body)
    assert type(message).__name__ == vector["message"]
    assert fields_of(message) == vector["fields"]


@by_name
def test_decodes_whole(vector: dict[str, Any]) -> None:
    data = bytes.fromhex(vector["frame"] + vector["payload"])
    frame, payload, connection = received(data, step=len(data))
    check(vector, frame, payload)
    assert not connection.mid_frame


@by_name
def test_decodes_byte_by_byte(vector: dict[str, Any]) -> None:
    data = bytes.fromhex(vector["frame"] + vector["payload"])
    frame, payload, connection = received(data, step=1)
    check(vector, frame, payload)
    assert not connection.mid_frame


@by_name
def test_leaves_what_follows(vector: dict[str, Any]) -> None:
    following = error_frame(9, ERRORS_BY_CODE[3]("next"))
    data = bytes.fromhex(vector["frame"] + vector["payload"]) + following
    frame, payload, connection = received(data, step=len(data))
    check(vector, frame, payload)
    event = connection.next_event()
    assert isinstance(event, Frame) and event.request_id == 9


@by_name
def test_says_nothing_of_an_incomplete_frame(vector: dict[str, Any]) -> None:
    data = bytes.fromhex(vector["frame"])
    connection = Connection()
    connection.authenticated()
    for byte in data[:-1]:
        connection.receive_data(bytes([byte]))
        assert connection.next_event() is NEED_DATA
        assert connection.mid_frame


@by_name
def test_encodes_to_the_same_bytes(vector: dict[str, Any]) -> None:
    data = bytes.fromhex(vector["frame"])
    payload_bytes = len(vector["payload"]) // 2
    if vector["flags"] & ERROR:
        error = ERRORS_BY_CODE[vector["status"]](vector["text"])
        assert error_frame(vector["request_id"], error) == data
        return
    opcode = Opcode(vector["opcode"])
    request, reply = regenerate.SAMPLES[opcode]
    flags = vector["flags"] & PUSH
    if vector["flags"] & REPLY:
        made = reply_frame(vector["request_id"], reply, payload_bytes=payload_bytes, flags=flags)
    else:
        made = request_frame(
            opcode, vector["request_id"], request, payload_bytes=payload_bytes, flags=flags
        )
    assert made == data


def test_every_opcode_and_error_has_its_frames() -> None:
    assert {v["name"] for v in VECTORS} == {
        f"{opcode.name} {what}" for opcode in Opcode for what in ("request", "reply")
    } | {f"{kind.__name__} reply" for kind in ERRORS_BY_CODE.values()}


def test_files_are_up_to_date() -> None:
    """If this fails the protocol has changed: regenerate, and say so in docs/protocol.md."""
    assert FRAMES.read_text() == regenerate.text_of(regenerate.frame_vectors())
    assert HANDSHAKE.read_text() == regenerate.text_of(regenerate.handshake_vector())


def test_a_record_may_gain_fields_at_its_end() -> None:
    """An older peer drops what it does not know; a newer one fills in what is missing."""
    longer = msgspec.msgpack.encode([1, b"name", "a field of the future"])
    assert fields_of(decode_request(Opcode.LOOKUP, longer)) == fields_of(
        decode_request(Opcode.LOOKUP, msgspec.msgpack.encode([1, b"name"]))
    )
    shorter = msgspec.msgpack.encode([5])
    assert decode_request(Opcode.SET_ATTRIBUTES, shorter).mode is None  # type: ignore[attr-defined]
