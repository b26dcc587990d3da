"""The fixed part of every frame: 24 bytes in network order.

    offset  size  field
    0       4     magic 0x43524C46 ("CRLF")
    4       1     version
    5       1     flags: 1 reply, 2 push (a request that the server sends), 4 error
    6       2     opcode of a request; status of a reply: 0, or the error's wire code
    8       8     request id
    16      4     body length, bytes
    20      4     payload length, bytes

Magic and version keep their places in every version of the protocol, so that a peer of another
version is told apart from one that speaks something else.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from crailfs.errors import ProtocolError, VersionError
from crailfs.limits import HEADER_BYTES, PROTOCOL_VERSION

MAGIC: Final = 0x43524C46
MAGIC_BYTES: Final = MAGIC.to_bytes(4, "big")

REPLY: Final = 1
PUSH: Final = 2
ERROR: Final = 4
ALL_FLAGS: Final = REPLY | PUSH | ERROR

STATUS_OK: Final = 0

_HEADER: Final = struct.Struct(">IBBHQII")
assert _HEADER.size == HEADER_BYTES


class Header(NamedTuple):
    flags: int
    code: int
    """Opcode of a request, status of a reply."""
    request_id: int
    body_bytes: int
    payload_bytes: int


def pack_header(
    flags: int, code: int, request_id: int, body_bytes: int, payload_bytes: int
) -> bytes:
    return _HEADER.pack(MAGIC, PROTOCOL_VERSION, flags, code, request_id, body_bytes, payload_bytes)


def unpack_header(data: bytes | bytearray | memoryview) -> Header:
    """The header at the start of ``data``, which has at least ``HEADER_BYTES``.

    Raises ``ProtocolError`` for another magic or unknown flags, ``VersionError`` for another
    version. Lengths are the caller's to check: only it knows which limits are in force.
    """
    magic, version, flags, code, request_id, body_bytes, payload_bytes = _HEADER.unpack_from(data)
    if magic != MAGIC:
        raise ProtocolError(
            f"frame begins with 0x{magic:08x} instead of 0x{MAGIC:08x}: the peer does not speak"
            " CrailFS's protocol; check the address"
        )
    if version != PROTOCOL_VERSION:
        raise VersionError(
            f"peer speaks protocol version {version}, this side {PROTOCOL_VERSION}: run the same"
            " release of CrailFS on both"
        )
    if flags & ~ALL_FLAGS or (flags & ERROR and not flags & REPLY):
        raise ProtocolError(f"frame has impossible flags 0x{flags:02x}")
    return Header(flags, code, request_id, body_bytes, payload_bytes)
