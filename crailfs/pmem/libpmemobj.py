"""libpmemobj: a pool of objects in persistent memory, changed in transactions.

Objects are named by their offset in the pool, which is also their offset in the file or device:
pools here have one part. See libpmemobj(7), pmemobj_tx_begin(3). Every function raises
``NotSupportedError`` if the library is missing and ``OSError`` if it refuses.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NoReturn

from crailfs.pmem.library import Library

_ZERO: Final = 1
_TX_STAGE_WORK: Final = 1
_TX_PARAM_NONE: Final = 0

_library: Final = Library("libpmemobj.so.1", "libpmemobj1")
missing = _library.missing


class _ObjectId(ctypes.Structure):
    _fields_ = (("pool_uuid_lo", ctypes.c_uint64), ("offset", ctypes.c_uint64))


@functools.cache
def _functions() -> ctypes.CDLL:
    library = _library.load()
    address, size, text = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p
    for name, result, arguments in (
        ("pmemobj_create", address, (text, text, size, ctypes.c_uint)),
        ("pmemobj_open", address, (text, text)),
        ("pmemobj_close", None, (address,)),
        ("pmemobj_check", ctypes.c_int, (text, text)),
        ("pmemobj_root", _ObjectId, (address, size)),
        ("pmemobj_root_size", size, (address,)),
        (
            "pmemobj_xalloc",
            ctypes.c_int,
            (
                address,
                ctypes.POINTER(_ObjectId),
                size,
                ctypes.c_uint64,
                ctypes.c_uint64,
                address,
                address,
            ),
        ),
        ("pmemobj_persist", None, (address, address, size)),
        ("pmemobj_memcpy_persist", address, (address, address, text, size)),
        ("pmemobj_ctl_set", ctypes.c_int, (address, text, address)),
        ("pmemobj_tx_begin", ctypes.c_int, (address, address, ctypes.c_int)),
        ("pmemobj_tx_stage", ctypes.c_int, ()),
        ("pmemobj_tx_add_range_direct", ctypes.c_int, (address, size)),
        ("pmemobj_tx_abort", None, (ctypes.c_int,)),
        ("pmemobj_tx_commit", None, ()),
        ("pmemobj_tx_end", ctypes.c_int, ()),
        ("pmemobj_errormsg", text, ()),
    ):
        function: Any = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def check(path: Path, layout: str) -> bool:
    """Whether the closed pool at ``path`` is consistent; looks at a private copy. Not for devices,
    which cannot be copied on write. Raises ``OSError`` if that cannot be told."""
    found = _functions().pmemobj_check(os.fsencode(path), layout.encode())
    if found < 0:
        _fail(path)
    return bool(found)


class Pool:
    """An open pool. No method may be called any more after ``close``."""

    def __init__(self, address: int) -> None:
        self.address = address
        """Of the pool's first byte in this process."""

    @classmethod
    def create(cls, path: Path, layout: str, *, count_unsafe_shutdowns: bool) -> Pool:
        """Make a pool in an existing file of its full size, or in a device, whose first 4 KiB are
        zero. ``count_unsafe_shutdowns``: whether opening it asks the device for power cuts that
        it could not save its caches in; raises ``ENOTSUP`` where no device can tell."""
        counted = ctypes.c_int(count_unsafe_shutdowns)
        functions = _functions()
        if functions.pmemobj_ctl_set(None, b"sds.at_create", ctypes.byref(counted)) != 0:
            _fail(path)
        address = functions.pmemobj_create(os.fsencode(path), layout.encode(), 0, 0o600)
        if address is None:
            _fail(path)
        return cls(address)

    @classmethod
    def open(cls, path: Path, layout: str) -> Pool:
        """Open it and undo what was in a transaction when it was last in use. Raises ``EAGAIN`` if
        another process has it open, ``EINVAL`` if it is none or is damaged."""
        address = _functions().pmemobj_open(os.fsencode(path), layout.encode())
        if address is None:
            _fail(path)
        return cls(address)

    def close(self) -> None:
        _functions().pmemobj_close(self.address)

    def root(self, byte_count: int) -> int:
        """The offset of the root object, made of ``byte_count`` zeros if there is none."""
        root: _ObjectId = _functions().pmemobj_root(self.address, byte_count)
        if root.offset == 0:
            _fail()
        return int(root.offset)

    def root_bytes(self) -> int:
        """0: there is no root object yet."""
        return int(_functions().pmemobj_root_size(self.address))

    def allocate(self, byte_count: int, *, zero: bool) -> int:
        """The offset of a new object, which is aligned to a cache line. Raises ``ENOMEM``."""
        made = _ObjectId()
        failed = _functions().pmemobj_xalloc(
            self.address, ctypes.byref(made), byte_count, 0, _ZERO if zero else 0, None, None
        )
        if failed:
            _fail()
        return int(made.offset)

    def read(self, offset: int, byte_count: int) -> bytes:
        return ctypes.string_at(self.address + offset, byte_count)

    def write(self, offset: int, data: bytes) -> None:
        """Outside of transactions; durable when it returns, but not at once as a whole."""
        _functions().pmemobj_memcpy_persist(self.address, self.address + offset, data, len(data))

    def persist(self, offset: int, byte_count: int) -> None:
        """Make durable what was stored there outside of transactions."""
        _functions().pmemobj_persist(self.address, self.address + offset, byte_count)

    def transaction(self) -> Transaction:
        return Transaction(self)


class Transaction:
    """A context manager: all of its writes are there afterwards, whatever happens, or, if its block
    raises, none. Of one thread at a time; not nested."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def __enter__(self) -> Transaction:
        functions = _functions()
        assert functions.pmemobj_tx_stage() == 0, "transactions are not nested"
        if functions.pmemobj_tx_begin(self._pool.address, None, _TX_PARAM_NONE) != 0:
            functions.pmemobj_tx_end()
            _fail()
        return self

    def write(self, offset: int, data: bytes) -> None:
        """Raises ``ENOMEM`` if the pool has no room for the bytes that are there now: the block
        must be left then."""
        functions, address = _functions(), self._pool.address + offset
        if functions.pmemobj_tx_add_range_direct(address, len(data)) != 0:
            _fail()
        ctypes.memmove(address, data, len(data))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        functions = _functions()
        if functions.pmemobj_tx_stage() == _TX_STAGE_WORK:
            if error is None:
                functions.pmemobj_tx_commit()
            else:
                functions.pmemobj_tx_abort(errno.ECANCELED)
        problem = functions.pmemobj_tx_end()
        if problem and error is None:
            raise OSError(problem, os.strerror(problem), "a transaction in persistent memory")


def _fail(path: Path | None = None) -> NoReturn:
    problem = ctypes.get_errno()
    reason = _functions().pmemobj_errormsg().decode(errors="replace") or os.strerror(problem)
    raise OSError(problem, reason, None if path is None else str(path))
