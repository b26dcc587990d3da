"""libpmem: mapping persistent memory and writing the processor's caches back to it.

Addresses are integers in this process; nothing here knows whether they are mapped. Every function
raises ``NotSupportedError`` if the library is missing. See libpmem(7).
"""

from __future__ import annotations

import ctypes
import enum
import functools
import os
from pathlib import Path
from typing import Any, Final, NamedTuple, NoReturn

from crailfs.net.sending import Buffer
from crailfs.pmem.library import Library

_library: Final = Library("libpmem.so.1", "libpmem1")
missing = _library.missing


class MemcpyFlag(enum.IntFlag):
    """How ``memcpy`` and ``memset`` store, ``PMEM_F_MEM_*``."""

    DEFAULT = 0
    """Durable when it returns; past the caches from 256 bytes on."""
    NODRAIN = 1
    """Durable only after ``drain``."""
    NONTEMPORAL = 2
    """Past the caches."""
    TEMPORAL = 4
    """Into the caches, then written back."""
    NOFLUSH = 32
    """Into the caches only."""


class FileMapping(NamedTuple):
    address: int
    byte_count: int
    is_pmem: bool
    """Whether ``persist`` makes bytes in it durable; else it takes ``msync``."""


class _PyBuffer(ctypes.Structure):
    """CPython's ``Py_buffer``: how the address of a read-only buffer is found."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.c_void_p),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_void_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


_python = ctypes.PyDLL(None)
"""Not ``ctypes.pythonapi``: that is everybody's, and so would be the types set here."""
_get_buffer = _python.PyObject_GetBuffer
_get_buffer.argtypes = (ctypes.py_object, ctypes.POINTER(_PyBuffer), ctypes.c_int)
_release_buffer = _python.PyBuffer_Release
_release_buffer.argtypes = (ctypes.POINTER(_PyBuffer),)
_release_buffer.restype = None


@functools.cache
def _functions() -> ctypes.CDLL:
    library = _library.load()
    address, size = ctypes.c_void_p, ctypes.c_size_t
    for name, result, arguments in (
        (
            "pmem_map_file",
            address,
            (
                ctypes.c_char_p,
                size,
                ctypes.c_int,
                ctypes.c_uint,
                ctypes.POINTER(size),
                ctypes.POINTER(ctypes.c_int),
            ),
        ),
        ("pmem_unmap", ctypes.c_int, (address, size)),
        ("pmem_is_pmem", ctypes.c_int, (address, size)),
        ("pmem_persist", None, (address, size)),
        ("pmem_flush", None, (address, size)),
        ("pmem_drain", None, ()),
        ("pmem_msync", ctypes.c_int, (address, size)),
        ("pmem_memcpy", address, (address, address, size, ctypes.c_uint)),
        ("pmem_memset", address, (address, ctypes.c_int, size, ctypes.c_uint)),
        ("pmem_errormsg", ctypes.c_char_p, ()),
    ):
        function: Any = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def map_file(path: Path) -> FileMapping:
    """Map an existing file or device as a whole; give it back to ``unmap``. Raises ``OSError``."""
    byte_count, is_pmem = ctypes.c_size_t(), ctypes.c_int()
    address = _functions().pmem_map_file(
        os.fsencode(path), 0, 0, 0, ctypes.byref(byte_count), ctypes.byref(is_pmem)
    )
    if address is None:
        _fail(path)
    return FileMapping(address, byte_count.value, bool(is_pmem.value))


def unmap(mapping: FileMapping) -> None:
    if _functions().pmem_unmap(mapping.address, mapping.byte_count) != 0:
        _fail()


def is_pmem(address: int, byte_count: int) -> bool:
    """Whether ``persist`` suffices for all these bytes: only in what the library mapped itself."""
    return bool(_functions().pmem_is_pmem(address, byte_count))


def persist(address: int, byte_count: int) -> None:
    """Write back the cache lines of these bytes and wait until the memory has them."""
    _functions().pmem_persist(address, byte_count)


def flush(address: int, byte_count: int) -> None:
    """Begin to write back the cache lines of these bytes; ``drain`` waits for it."""
    _functions().pmem_flush(address, byte_count)


def drain() -> None:
    _functions().pmem_drain()


def msync(address: int, byte_count: int) -> None:
    """For mappings that are not persistent memory: write dirty pages to the device and wait for it.
    Raises ``OSError``."""
    if _functions().pmem_msync(address, byte_count) != 0:
        _fail()


def memcpy(address: int, source: Buffer, flags: MemcpyFlag = MemcpyFlag.DEFAULT) -> None:
    """Copy all of ``source``, durable unless ``flags`` say otherwise."""
    buffer = _PyBuffer()
    _get_buffer(source, buffer, 0)
    try:
        _functions().pmem_memcpy(address, buffer.buf, buffer.len, flags)
    finally:
        _release_buffer(buffer)


def memset(
    address: int, value: int, byte_count: int, flags: MemcpyFlag = MemcpyFlag.DEFAULT
) -> None:
    _functions().pmem_memset(address, value, byte_count, flags)


def _fail(path: Path | None = None) -> NoReturn:
    problem = ctypes.get_errno()
    reason = _functions().pmem_errormsg().decode(errors="replace") or os.strerror(problem)
    raise OSError(problem, reason, None if path is None else str(path))
