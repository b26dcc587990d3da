"""Messages and bodies: every value of every type makes the round trip, everything else is refused
with the error that says whose fault it is."""

from __future__ import annotations

import tracemalloc
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crailfs import limits
from crailfs.errors import (
    AttributeSpaceError,
    CrailError,
    InvalidError,
    NameTooLongError,
    NotFoundError,
    ProtocolError,
)
from crailfs.records import ANY_TIER, Location, NodeKind, Run
from crailfs.wire import messages as m
from crailfs.wire.checks import check_request
from crailfs.wire.codec import (
    ERROR_TEXT_MAX_CHARACTERS,
    decode_error,
    decode_reply,
    decode_request,
    error_frame,
    opcode_of,
    reply_frame,
    request_frame,
)
from crailfs.wire.header import unpack_header
from crailfs.wire.messages import OPERATIONS, Message, Opcode
from tests.vectors.regenerate import EXTENT, SAMPLES


def body_of(frame: bytes) -> bytes:
    return frame[limits.HEADER_BYTES :]


def values_of(kind: msgspec.inspect.Type, field: str = "") -> st.SearchStrategy[Any]:
    """Values of a field's type that every message may hold."""
    i = msgspec.inspect
    if isinstance(kind, i.StructType):
        fields = {f.name: values_of(f.type, f.name) for f in kind.fields}
        return st.builds(kind.cls, **fields)
    if isinstance(kind, i.UnionType):
        return st.one_of([values_of(option, field) for option in kind.types])
    if isinstance(kind, i.VarTupleType):
        return st.lists(values_of(kind.item_type), max_size=3).map(tuple)
    if isinstance(kind, i.DictType):
        return st.dictionaries(values_of(kind.key_type), values_of(kind.value_type), max_size=3)
    if isinstance(kind, i.EnumType):
        return st.sampled_from(kind.cls)
    if isinstance(kind, i.IntType):
        if field.endswith("_ns"):
            return st.integers(-(2**63), 2**63 - 1)
        return st.integers(0, 2**32 - 1) | (
            st.nothing()
            if field in ("region", "region_id", "uid", "gid", "mode")
            else st.integers(0, 2**64 - 1)
        )
    simple: dict[type, st.SearchStrategy[Any]] = {
        i.BytesType: st.binary(max_size=16),
        i.StrType: st.text(max_size=8),
        i.BoolType: st.booleans(),
        i.FloatType: st.floats(allow_nan=False),
        i.NoneType: st.none(),
    }
    return simple[type(kind)]


OPCODES = st.sampled_from(Opcode)
REQUESTS = {
    opcode: values_of(msgspec.inspect.type_info(row.request)) for opcode, row in OPERATIONS.items()
}
REPLIES = {
    opcode: values_of(msgspec.inspect.type_info(row.reply)) for opcode, row in OPERATIONS.items()
}
# Hypothesis prepares its tables of characters in the first draw, which takes seconds.
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@unhurried
@given(st.data(), OPCODES)
def test_requests_make_the_round_trip(data: st.DataObject, opcode: Opcode) -> None:
    request = data.draw(REQUESTS[opcode])
    frame = request_frame(opcode, 2**64 - 1, request)
    header = unpack_header(frame)
    assert (header.code, header.request_id) == (opcode, 2**64 - 1)
    assert header.body_bytes == len(body_of(frame))
    assert decode_request(opcode, body_of(frame)) == request


@unhurried
@given(st.data(), OPCODES)
def test_replies_make_the_round_trip(data: st.DataObject, opcode: Opcode) -> None:
    reply = data.draw(REPLIES[opcode])
    assert decode_reply(opcode, body_of(reply_frame(1, reply))) == reply


@given(OPCODES, st.binary(max_size=100))
def test_random_bodies_are_messages_or_a_protocol_error(opcode: Opcode, body: bytes) -> None:
    for decode in (decode_request, decode_reply):
        try:
            assert isinstance(decode(opcode, body), Message)
        except ProtocolError:
            pass
        except CrailError as error:
            assert isinstance(error, InvalidError | NameTooLongError | AttributeSpaceError)


@given(OPCODES, st.data())
def test_truncated_bodies_are_protocol_errors(opcode: Opcode, data: st.DataObject) -> None:
    body = body_of(request_frame(opcode, 1, SAMPLES[opcode][0]))
    cut = data.draw(st.integers(0, len(body) - 1))
    with pytest.raises(ProtocolError):
        decode_request(opcode, body[:cut])


@pytest.mark.parametrize("opcode", Opcode)
def test_trailing_bytes_are_protocol_errors(opcode: Opcode) -> None:
    with pytest.raises(ProtocolError):
        decode_request(opcode, body_of(request_frame(opcode, 1, SAMPLES[opcode][0])) + b"\0")


@pytest.mark.parametrize(
    "body",
    [
        b"\x91\xdd\xff\xff\xff\xff",  # an array of 4 G items that are not there
        b"\x91\xdd\x7f\xff\xff\xff\x01",
        b"\x91\xc6\xff\xff\xff\xff",  # 4 GiB of bytes
        b"\x93\x01\xdf\xff\xff\xff\xff",  # a map where an array is expected
        b"\x91" * 100_000,  # nesting
    ],
)
def test_announced_lengths_cost_nothing(body: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError):
            decode_request(Opcode.RELEASE_INODES, body)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


LONG = b"n" * (limits.NAME_MAX_BYTES + 1)
NAME = b"n" * limits.NAME_MAX_BYTES
CREATE = m.CreateNode(1, b"n", NodeKind.SYMLINK, 0o777, 0, 0)
COMMIT = m.CommitFile(1, (EXTENT,), (), 0, 0)


def changed(message: Any, **fields: Any) -> Any:
    return msgspec.structs.replace(message, **fields)


@pytest.mark.parametrize(
    "request_",
    [
        m.Lookup(1, NAME),
        m.ReadDirectory(1, b"", 0),
        changed(CREATE, target=b"t" * limits.SYMLINK_MAX_BYTES),
        changed(CREATE, location="ü" * (limits.LOCATION_MAX_BYTES // 2)),
        m.SetXattr(1, NAME, bytes(limits.XATTR_VALUE_MAX_BYTES)),
        m.SetAttributes(1, atime_ns=-(2**63), mtime_ns=2**63 - 1),
        m.KeepAlive(1, (1,) * limits.RENEW_MAX),
        changed(COMMIT, mtime_ns=-1),
    ],
    ids=lambda request: type(request).__name__,
)
def test_values_at_their_limits_are_taken(request_: Message) -> None:
    check_request(request_)


@pytest.mark.parametrize(
    ("request_", "error", "field"),
    [
        (m.Lookup(1, LONG), NameTooLongError, "Lookup.name"),
        (m.Lookup(-1, b"n"), InvalidError, "Lookup.parent"),
        (m.RenameNode(1, b"n", 1, LONG), NameTooLongError, "RenameNode.new_name"),
        (m.ReadDirectory(1, LONG, 5), NameTooLongError, "after_name"),
        (m.ReadDirectory(1, b"", -5), InvalidError, "entry_limit"),
        (m.PutKeyValue(1, LONG, 0, 0, 0, 0, ()), NameTooLongError, "key"),
        (
            changed(CREATE, target=b"t" * (limits.SYMLINK_MAX_BYTES + 1)),
            NameTooLongError,
            "target",
        ),
        (changed(CREATE, location="ü" * 33), InvalidError, "location has 66 bytes"),
        (changed(CREATE, uid=2**32), InvalidError, "uid"),
        (
            m.SetXattr(1, b"n", bytes(limits.XATTR_VALUE_MAX_BYTES + 1)),
            AttributeSpaceError,
            "value",
        ),
        (m.SetAttributes(1, size=-1), InvalidError, "size"),
        (m.SetAttributes(1, mtime_ns=2**63), InvalidError, "mtime_ns"),
        (m.KeepAlive(1, (1,) * (limits.RENEW_MAX + 1)), InvalidError, "renew has 65537 items"),
        (m.KeepAlive(1, (1, -1)), InvalidError, "renew"),
        (m.ReturnBlocks((Run(2**32, 0, 1, 1),)), InvalidError, "Run.region"),
        (m.ReturnBlocks((Run(1, 0, -1, 1),)), InvalidError, "Run.block_count"),
        (changed(COMMIT, extents=(EXTENT,) * 8_193), InvalidError, "extents"),
        (
            changed(COMMIT, extents=(changed(EXTENT, checksums=bytes(1_025)),)),
            InvalidError,
            "checksums",
        ),
        (
            changed(COMMIT, extents=(changed(EXTENT, replicas=(Location(1, -2, 3),)),)),
            InvalidError,
            "Location.block",
        ),
        (
            changed(COMMIT, extents=(changed(EXTENT, replicas=(Location(1, 2, 3),) * 9),)),
            InvalidError,
            "replicas",
        ),
    ],
)
def test_values_beyond_their_limits_are_refused(
    request_: Message, error: type[CrailError], field: str
) -> None:
    opcode = next(op for op, row in OPERATIONS.items() if row.request is type(request_))
    with pytest.raises(error, match=field):
        decode_request(opcode, body_of(request_frame(opcode, 1, request_)))


def test_a_message_too_large_for_a_frame_is_not_sent() -> None:
    with pytest.raises(InvalidError, match="split it"):
        reply_frame(1, m.XattrValue(bytes(limits.BODY_MAX_BYTES)))
    with pytest.raises(InvalidError, match="split it"):
        reply_frame(1, m.Empty(), payload_bytes=limits.PAYLOAD_MAX_BYTES + 1)


def test_errors_keep_their_class_and_text() -> None:
    frame = error_frame(5, NotFoundError("no 'x' in inode 1"))
    error = decode_error(unpack_header(frame).code, body_of(frame))
    assert type(error) is NotFoundError
    assert error.message == "no 'x' in inode 1"


def test_an_error_text_is_cut_and_made_printable() -> None:
    frame = error_frame(5, NotFoundError("\udcff" + "x" * 10_000))
    error = decode_error(unpack_header(frame).code, body_of(frame))
    assert error.message == "?" + "x" * (ERROR_TEXT_MAX_CHARACTERS - 1)


def test_an_unknown_error_code_is_named() -> None:
    error = decode_error(60_000, msgspec.msgpack.encode("odd"))
    assert type(error) is CrailError
    assert "60000" in error.message


@pytest.mark.parametrize("body", [b"", b"\xc0", b"\x01", b"\xa5ab"])
def test_an_error_without_a_text_is_a_protocol_error(body: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_error(3, body)


def test_text_that_is_not_utf8_is_a_protocol_error() -> None:
    request = m.GrantBlocks(ANY_TIER, "rack-1", "host", 1, 1)
    body = msgspec.msgpack.encode(request).replace(b"rack-1", b"rack-\xff")
    with pytest.raises(ProtocolError, match="GRANT_BLOCKS"):
        decode_request(Opcode.GRANT_BLOCKS, body)
    with pytest.raises(ProtocolError):
        decode_error(5, b"\xa1\xff")


def test_opcodes_are_found_by_number() -> None:
    assert opcode_of(20) is Opcode.LOOKUP
    assert opcode_of(0) is None
    assert opcode_of(65_535) is None
