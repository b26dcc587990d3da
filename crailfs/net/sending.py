"""Bytes on their way out of a non-blocking socket, without copying them."""

from __future__ import annotations

import array
import collections
import os
import socket
from collections.abc import Sequence
from typing import Final, NamedTuple

Buffer = bytes | bytearray | memoryview

BUFFERS_PER_CALL: Final = 512
"""The kernel takes at most 1,024 (IOV_MAX)."""
DESCRIPTORS_PER_CALL: Final = 253
"""The kernel's SCM_MAX_FD."""


class _WithDescriptors(NamedTuple):
    data: Buffer
    fds: tuple[int, ...]
    """Duplicates that are the queue's own; they leave with the first byte of ``data``."""


class SendQueue:
    """What one socket still has to send, in order. The buffers must not change until sent."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._items: collections.deque[Buffer | _WithDescriptors] = collections.deque()
        self.byte_count = 0
        """Bytes that are waiting."""

    def append(self, frame: bytes, payload: Sequence[memoryview] = ()) -> None:
        self._items.append(frame)
        self.byte_count += len(frame)
        for view in payload:
            if view.nbytes:
                self._items.append(view)
                self.byte_count += view.nbytes

    def append_with_descriptors(self, frame: bytes, fds: Sequence[int]) -> None:
        """Queues duplicates of ``fds`` with the frame: the caller keeps and closes its own."""
        start = 0
        for index in range(0, len(fds), DESCRIPTORS_PER_CALL):
            group = fds[index : index + DESCRIPTORS_PER_CALL]
            # All groups but the last go with a byte each of the header.
            last = index + DESCRIPTORS_PER_CALL >= len(fds)
            end = len(frame) if last else start + 1
            copies = tuple(os.dup(fd) for fd in group)
            self._items.append(_WithDescriptors(frame[start:end], copies))
            start = end
        self.byte_count += len(frame)

    def flush(self) -> bool:
        """Sends what the socket takes now; True when nothing is left. Raises ``OSError``."""
        items = self._items
        while items:
            first = items[0]
            try:
                if isinstance(first, _WithDescriptors):
                    sent = self._send_descriptors(first)
                elif len(items) == 1:
                    sent = self._sock.send(first)
                else:
                    sent = self._sock.sendmsg(self._next_buffers())
            except BlockingIOError:
                return False
            self._drop_sent(sent)
        return True

    def detach(self, buffer: Buffer) -> None:
        """Copies what waits of ``buffer``'s memory: its owner may change it from now on."""
        for index, item in enumerate(self._items):
            if isinstance(item, memoryview) and item.obj is memoryview(buffer).obj:
                self._items[index] = bytes(item)

    def close(self) -> None:
        """Drops everything and closes the descriptors that were to be passed on."""
        for item in self._items:
            if isinstance(item, _WithDescriptors):
                _close_all(item.fds)
        self._items.clear()
        self.byte_count = 0

    def _next_buffers(self) -> list[Buffer]:
        buffers: list[Buffer] = []
        for item in self._items:
            if isinstance(item, _WithDescriptors) or len(buffers) == BUFFERS_PER_CALL:
                break
            buffers.append(item)
        return buffers

    def _send_descriptors(self, item: _WithDescriptors) -> int:
        rights = array.array("i", item.fds)
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)]
        sent = self._sock.sendmsg([item.data], ancillary)
        _close_all(item.fds)
        self._items[0] = item.data
        return sent

    def _drop_sent(self, byte_count: int) -> None:
        self.byte_count -= byte_count
        items = self._items
        while byte_count:
            item = items[0]
            assert not isinstance(item, _WithDescriptors)
            if len(item) > byte_count:
                items[0] = memoryview(item)[byte_count:]
                return
            byte_count -= len(item)
            items.popleft()


def byte_views(payload: Buffer | Sequence[Buffer]) -> list[memoryview]:
    """``payload`` as views of single bytes, whatever its items' format."""
    buffers = [payload] if isinstance(payload, (bytes, bytearray, memoryview)) else payload
    return [memoryview(buffer).cast("B") for buffer in buffers]


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
