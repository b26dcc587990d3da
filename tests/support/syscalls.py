"""System calls that Python's ``os`` does not have, by ctypes. Each raises ``OSError``."""

from __future__ import annotations

import ctypes
import os

_LIBC = ctypes.CDLL(None, use_errno=True)
_AT_FDCWD = -100

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
RENAME_WHITEOUT = 4

FALLOC_FL_KEEP_SIZE = 1
FALLOC_FL_PUNCH_HOLE = 2
FALLOC_FL_ZERO_RANGE = 16


def _check(result: int) -> int:
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def renameat2(old: os.PathLike[str], new: os.PathLike[str], flags: int) -> None:
    _check(
        _LIBC.renameat2(
            ctypes.c_int(_AT_FDCWD),
            ctypes.c_char_p(os.fsencode(old)),
            ctypes.c_int(_AT_FDCWD),
            ctypes.c_char_p(os.fsencode(new)),
            ctypes.c_uint(flags),
        )
    )


def fallocate(fd: int, mode: int, offset: int, byte_count: int) -> None:
    """The system call itself: ``os.posix_fallocate`` falls back to writing zeros."""
    _check(
        _LIBC.fallocate(
            ctypes.c_int(fd), ctypes.c_int(mode), ctypes.c_int64(offset), ctypes.c_int64(byte_count)
        )
    )


UTIME_NOW = (1 << 30) - 1
UTIME_OMIT = (1 << 30) - 2


class _Timespec(ctypes.Structure):
    _fields_ = (("tv_sec", ctypes.c_int64), ("tv_nsec", ctypes.c_long))


def utimensat(
    path: os.PathLike[str], access: tuple[int, int], modification: tuple[int, int]
) -> None:
    """(seconds, nanoseconds) each; the nanoseconds may be ``UTIME_NOW`` or ``UTIME_OMIT``."""
    times = (_Timespec * 2)(_Timespec(*access), _Timespec(*modification))
    _check(
        _LIBC.utimensat(
            ctypes.c_int(_AT_FDCWD), ctypes.c_char_p(os.fsencode(path)), times, ctypes.c_int(0)
        )
    )
