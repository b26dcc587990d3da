"""One connection as the connecting side sees it: a socket, a state machine and a send queue."""

from __future__ import annotations

import array
import os
import socket
from typing import Final

import trio

from crailfs.config import Credentials
from crailfs.errors import ProtocolError
from crailfs.net.sending import DESCRIPTORS_PER_CALL, SendQueue
from crailfs.wire.codec import decode_error, decode_reply, request_frame
from crailfs.wire.connection import NEED_DATA, Connection, Event, Frame
from crailfs.wire.handshake import ConnectingSide
from crailfs.wire.header import ERROR, REPLY
from crailfs.wire.messages import Challenge, Message, Opcode, Role, Welcome

_DESCRIPTOR_BYTES: Final = array.array("i").itemsize
ANCILLARY_BYTES: Final = socket.CMSG_SPACE(DESCRIPTORS_PER_CALL * _DESCRIPTOR_BYTES)


class Link:
    """Owns ``sock`` until ``close``. ``receive`` and ``send`` never block."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.connection = Connection()
        self.queue = SendQueue(sock)
        self.received_fds: list[int] | None = None
        """A list to which arriving file descriptors are added; ``None``: the kernel drops them."""
        self._scratch = memoryview(bytearray(self.connection.receive_max_bytes))

    def close(self) -> None:
        self.queue.close()
        self.sock.close()

    def authenticated(self) -> None:
        self.connection.authenticated()
        self._scratch = memoryview(bytearray(self.connection.receive_max_bytes))

    def receive(self) -> bool:
        """Takes what one read of the socket gives; False: there was nothing.

        Raises ``OSError`` if the connection has ended.
        """
        space = self.connection.payload_space()
        try:
            if space is not None:
                byte_count = self.sock.recv_into(space)
                if byte_count:
                    self.connection.payload_written(byte_count)
            else:
                byte_count = self._receive_scratch()
                self.connection.receive_data(self._scratch[:byte_count])
        except BlockingIOError:
            return False
        if byte_count == 0:
            raise ConnectionResetError("the server closed the connection")
        return True

    def _receive_scratch(self) -> int:
        fds = self.received_fds
        if fds is None:
            return self.sock.recv_into(self._scratch)
        byte_count, ancillary, _, _ = self.sock.recvmsg_into(
            [self._scratch], ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC
        )
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                arrived = array.array("i")
                arrived.frombytes(data[: len(data) - len(data) % _DESCRIPTOR_BYTES])
                fds.extend(arrived)
        return byte_count

    async def handshake(
        self, credentials: Credentials, role: Role, client_id: int
    ) -> tuple[Challenge, Welcome]:
        """Raises what the server refuses with, ``AuthenticationError`` or ``VersionError`` if the
        server is not acceptable to this side, ``OSError`` if the connection ends."""
        side = ConnectingSide(credentials, role, client_id)
        challenge = await self._ask(Opcode.HELLO, side.hello)
        assert isinstance(challenge, Challenge)
        welcome = await self._ask(Opcode.PROOF, side.answer(challenge))
        assert isinstance(welcome, Welcome)
        self.authenticated()
        return challenge, welcome

    async def _ask(self, opcode: Opcode, request: Message) -> Message:
        self.queue.append(request_frame(opcode, 0, request))
        while not self.queue.flush():
            await trio.lowlevel.wait_writable(self.sock)
        event: Event
        while (event := self.connection.next_event()) is NEED_DATA:
            await trio.lowlevel.wait_readable(self.sock)
            self.receive()
        if not isinstance(event, Frame) or not event.flags & REPLY or event.payload_bytes:
            raise ProtocolError(f"the server answered {opcode.name} with something else")
        if event.flags & ERROR:
            raise decode_error(event.code, event.body)
        return decode_reply(opcode, event.body)


def close_descriptors(fds: list[int]) -> None:
    while fds:
        os.close(fds.pop())
