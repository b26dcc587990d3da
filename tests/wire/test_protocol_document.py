"""docs/protocol.md says what the code does."""

from __future__ import annotations

from crailfs.errors import ERRORS_BY_CODE
from crailfs.limits import HEADER_BYTES, PROTOCOL_VERSION
from crailfs.wire import handshake
from crailfs.wire.header import ERROR, MAGIC, PUSH, REPLY
from crailfs.wire.messages import OPERATIONS, Opcode
from tests.wire.protocol_tables import BEGIN, DOCUMENT, tables

TEXT = DOCUMENT.read_text()


def test_the_tables_are_up_to_date() -> None:
    """If not: ``python -m tests.wire.protocol_tables``."""
    assert TEXT.split(BEGIN)[1] == tables().removeprefix(BEGIN)


def test_every_operation_is_there() -> None:
    for opcode, operation in OPERATIONS.items():
        assert f"| {opcode.value} | `{opcode.name}` |" in TEXT
        for kind in (operation.request, operation.reply):
            assert f"### {kind.__name__}\n" in TEXT


def test_every_error_is_there() -> None:
    for code, kind in ERRORS_BY_CODE.items():
        assert f"| {code} | `{kind.__name__}` |" in TEXT


def test_the_written_part_names_the_numbers_of_the_code() -> None:
    written = TEXT.split(BEGIN)[0]
    for words in (
        f"{HEADER_BYTES} bytes",
        f"0x{MAGIC:08X}",
        f"version {PROTOCOL_VERSION}",
        f"{REPLY} reply",
        f"{PUSH} push",
        f"{ERROR} error",
        f"{handshake.NONCE_BYTES} random bytes",
        f"`{handshake._ACCEPTING_LABEL.decode()}`",
        f"`{handshake._CONNECTING_LABEL.decode()}`",
        f"`{Opcode.HELLO.name}` ({Opcode.HELLO.value})",
        f"`{Opcode.PROOF.name}` ({Opcode.PROOF.value})",
    ):
        assert words in written, words
