"""Messages to frames and bodies to messages, held against the typed table ``OPERATIONS``.

A body that does not have its type's shape is a ``ProtocolError``. What a type alone does not bound
(the length of a name, the number of extents, a negative inode number) is checked by
``checks.check_request`` and refused with the error that the caller of that operation expects.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from crailfs.errors import CrailError, InvalidError, ProtocolError, error_from_wire
from crailfs.limits import BODY_MAX_BYTES, PAYLOAD_MAX_BYTES
from crailfs.units import KIB
from crailfs.wire.checks import check_request
from crailfs.wire.header import ERROR, REPLY, STATUS_OK, pack_header
from crailfs.wire.messages import OPERATIONS, Message, Opcode

ERROR_TEXT_MAX_CHARACTERS: Final = 1 * KIB

_encode: Final = msgspec.msgpack.Encoder().encode
_request_decoders: Final = {
    opcode: msgspec.msgpack.Decoder(operation.request) for opcode, operation in OPERATIONS.items()
}
_reply_decoders: Final = {
    opcode: msgspec.msgpack.Decoder(operation.reply) for opcode, operation in OPERATIONS.items()
}
_decode_text: Final = msgspec.msgpack.Decoder(str).decode
_opcodes: Final = {int(opcode): opcode for opcode in Opcode}


def opcode_of(number: int) -> Opcode | None:
    """The opcode with this number; ``None`` if this version of the protocol has none."""
    return _opcodes.get(number)


def request_frame(
    opcode: Opcode, request_id: int, request: Message, *, payload_bytes: int = 0, flags: int = 0
) -> bytes:
    """Header and body of a request (``flags=PUSH``: of one that a server sends).

    Raises ``InvalidError`` if it is larger than the protocol allows.
    """
    return _frame(flags, opcode, request_id, request, payload_bytes)


def reply_frame(
    request_id: int, reply: Message, *, payload_bytes: int = 0, flags: int = 0
) -> bytes:
    """Header and body of a reply (``flags=PUSH``: of one to a push).

    Raises ``InvalidError`` if it is larger than the protocol allows.
    """
    return _frame(REPLY | flags, STATUS_OK, request_id, reply, payload_bytes)


def error_frame(request_id: int, error: CrailError, *, flags: int = 0) -> bytes:
    """A reply that says what went wrong (``flags=PUSH``: with a push)."""
    text = _encode(error.message[:ERROR_TEXT_MAX_CHARACTERS].encode(errors="replace").decode())
    return pack_header(REPLY | ERROR | flags, error.wire_code, request_id, len(text), 0) + text


def _frame(flags: int, code: int, request_id: int, message: Message, payload_bytes: int) -> bytes:
    body = _encode(message)
    if len(body) > BODY_MAX_BYTES or payload_bytes > PAYLOAD_MAX_BYTES:
        raise InvalidError(
            f"{type(message).__name__} of {len(body)} bytes with a payload of {payload_bytes}:"
            f" at most {BODY_MAX_BYTES} and {PAYLOAD_MAX_BYTES} fit a frame; split it"
        )
    return pack_header(flags, code, request_id, len(body), payload_bytes) + body


def decode_request(opcode: Opcode, body: bytes | bytearray) -> Message:
    """Raises ``ProtocolError`` for a body of another shape; ``InvalidError``,
    ``NameTooLongError`` or ``AttributeSpaceError`` for values out of their limits."""
    request: Message = _decode(_request_decoders[opcode], body, opcode, "request")
    check_request(request)
    return request


def decode_reply(opcode: Opcode, body: bytes | bytearray) -> Message:
    """Raises ``ProtocolError`` for a body of another shape."""
    reply: Message = _decode(_reply_decoders[opcode], body, opcode, "reply")
    return reply


def decode_error(code: int, body: bytes | bytearray) -> CrailError:
    """The error that an error frame carries. Raises ``ProtocolError`` if its text is not one."""
    try:
        text = _decode_text(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProtocolError(f"error frame {code} without a text: {error}") from error
    return error_from_wire(code, text)


def _decode(
    decoder: msgspec.msgpack.Decoder[Any], body: bytes | bytearray, opcode: Opcode, what: str
) -> Any:
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProtocolError(f"{opcode.name} {what} of another shape: {error}") from error
    except RecursionError as error:
        raise ProtocolError(f"{opcode.name} {what} is nested too deeply") from error
