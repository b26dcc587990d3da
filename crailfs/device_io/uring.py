"""The kernel's io_uring, as it is: three system calls and two rings in shared memory.

The one maintained binding on the package index (liburing 2026.3.30) cannot be used: its wheel is
compiled for AVX-512 and dies of SIGILL on any other processor, and it never lets go of a buffer
that it was given. What is needed here is little, and no slower without it: 0.9 us a request.

Entries of a ring and its ends are read and written by plain loads and stores. That x86 keeps them
in order is what the protocol between kernel and process needs, so elsewhere this is not offered.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import struct
from collections.abc import Iterator
from typing import Final

READ: Final = 22
WRITE: Final = 23
FSYNC: Final = 3
FSYNC_DATASYNC: Final = 1

_SETUP: Final = 425
_ENTER: Final = 426
_REGISTER: Final = 427
_SETUP_SUBMIT_ALL: Final = 1 << 7
"""A request that is refused does not hold up those behind it: Linux 5.18."""
_ENTER_GETEVENTS: Final = 1
_REGISTER_FILES: Final = 2
_REGISTER_EVENTFD: Final = 4
_ENTRIES_OFFSET: Final = 0x1000_0000
"""Where, in the ring's descriptor, the submission entries are mapped from."""

_PARAMETERS: Final = struct.Struct("=II32x" + 2 * "8I8x")
"""``struct io_uring_params``: the entries of both rings, then where their parts are."""
_SUBMISSION: Final = struct.Struct("=BBHiQQIIQ24x")
"""Operation, flags, priority, descriptor, offset, address, length, operation's flags, token."""
_COMPLETION: Final = struct.Struct("=QiI")
_U32_MASK: Final = (1 << 32) - 1

# Submitting does not wait, so it keeps the interpreter's lock: letting go of it costs more.
_submitting: Final = ctypes.PyDLL(None, use_errno=True).syscall
_waiting: Final = ctypes.CDLL(None, use_errno=True).syscall


class Uring:
    """Room for ``entries`` requests, a power of two; the caller has no more under way.

    Raises ``OSError`` if the kernel allows no ring, or knows too old a one.
    """

    def __init__(self, entries: int) -> None:
        if platform.machine() != "x86_64":
            raise OSError(errno.ENOSYS, "not used on this processor")
        parameters = ctypes.create_string_buffer(_PARAMETERS.size)
        struct.pack_into("=8xI", parameters, 0, _SETUP_SUBMIT_ALL)
        self.fd = _call(_submitting, _SETUP, entries, parameters)
        (
            submissions, completions,
            _, sq_tail, _, _, _, _, sq_array, _,
            cq_head, cq_tail, _, _, _, cq_entries, _, _,
        ) = _PARAMETERS.unpack(parameters)  # fmt: skip
        size_bytes = max(sq_array + 4 * submissions, cq_entries + _COMPLETION.size * completions)
        self._ring = mmap.mmap(self.fd, size_bytes)
        self._entries = mmap.mmap(self.fd, _SUBMISSION.size * submissions, offset=_ENTRIES_OFFSET)
        self._words = memoryview(self._ring).cast("I")
        for index in range(submissions):
            self._words[sq_array // 4 + index] = index
        self._sq_mask, self._cq_mask = submissions - 1, completions - 1
        self._sq_tail_at, self._cq_head_at, self._cq_tail_at = (
            sq_tail // 4, cq_head // 4, cq_tail // 4,
        )  # fmt: skip
        self._cq_entries_at = cq_entries
        self._sq_tail = self._cq_head = 0

    def push(
        self, operation: int, fd: int, offset: int, address: int, byte_count: int, flags: int,
        token: int,
    ) -> None:  # fmt: skip
        """Queue a request; ``submit`` hands it to the kernel."""
        at = (self._sq_tail & self._sq_mask) * _SUBMISSION.size
        _SUBMISSION.pack_into(
            self._entries, at, operation, 0, 0, fd, offset, address, byte_count, flags, token
        )
        self._sq_tail = (self._sq_tail + 1) & _U32_MASK
        self._words[self._sq_tail_at] = self._sq_tail

    def submit(self, count: int) -> int:
        """Hand over ``count`` queued requests. How many the kernel took. Raises ``OSError``."""
        return _call(_submitting, _ENTER, self.fd, count, 0, 0, None, 0)

    def wait(self) -> None:
        """Until there is a completion; blocks. Raises ``OSError``."""
        _call(_waiting, _ENTER, self.fd, 0, 1, _ENTER_GETEVENTS, None, 0)

    def completions(self) -> Iterator[tuple[int, int]]:
        """Token and result (a negative error number if it failed) of each request that has ended
        since the last time."""
        head, tail = self._cq_head, self._words[self._cq_tail_at]
        while head != tail:
            at = self._cq_entries_at + (head & self._cq_mask) * _COMPLETION.size
            token, result, _ = _COMPLETION.unpack_from(self._ring, at)
            head = (head + 1) & _U32_MASK
            yield token, result
        self._cq_head = self._words[self._cq_head_at] = head

    def signal(self, event_fd: int) -> None:
        """Have the kernel add to ``event_fd`` whenever a request ends. Raises ``OSError``."""
        self._register(_REGISTER_EVENTFD, event_fd)

    def hold(self, fd: int) -> None:
        """Keep ``fd``'s file open, with its locks, until this ring's last request has ended, which
        is later than the end of a process that is killed. Raises ``OSError``."""
        self._register(_REGISTER_FILES, fd)

    def close(self) -> None:
        """Nothing may be under way."""
        self._words.release()
        self._ring.close()
        self._entries.close()
        os.close(self.fd)

    def _register(self, operation: int, fd: int) -> None:
        _call(_submitting, _REGISTER, self.fd, operation, ctypes.byref(ctypes.c_int(fd)), 1)


def _call(syscall: ctypes._NamedFuncPointer, number: int, *arguments: object) -> int:
    result: int = syscall(number, *arguments)
    if result < 0:
        problem = ctypes.get_errno()
        raise OSError(problem, os.strerror(problem))
    return result
