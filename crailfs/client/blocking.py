"""The synchronous face of ``CrailStore``, for programs without an event loop.

The store lives in a thread of its own that runs trio; each call hands its work over and waits.
"""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import TypeAlias, TypeVar

import trio

from crailfs.client.store import CrailStore, Entry, Names, Path
from crailfs.client.stream import StoreFile
from crailfs.config import ClientConfig
from crailfs.errors import InvalidError
from crailfs.records import Attributes, Durability, NodeKind, StorageClass
from crailfs.wire.messages import Statistics

Buffer: TypeAlias = bytes | bytearray | memoryview
T = TypeVar("T")


class BlockingStore:
    """As ``CrailStore``, method by method. Usable from several threads at once.

    ``with BlockingStore(config) as store: ...`` or ``open`` and ``close``. After ``close``, which
    commits what is still open, every call raises ``InvalidError``.
    """

    def __init__(
        self, config: ClientConfig, *, uid: int | None = None, gid: int | None = None
    ) -> None:
        self._config = config
        self._uid = uid
        self._gid = gid
        self._thread: threading.Thread | None = None
        self._ready = threading.Event()
        self._token: trio.lowlevel.TrioToken | None = None
        self._store: CrailStore | None = None
        self._closing: trio.Event | None = None
        self._failure: BaseException | None = None

    # --- life -------------------------------------------------------------------------------

    def open(self) -> BlockingStore:
        """Connect. Raises what ``CrailStore.connect`` raises."""
        if self._thread is not None:
            raise InvalidError("this store is open already")
        self._ready.clear()
        self._failure = None
        self._thread = threading.Thread(target=self._run, name="crailfs", daemon=True)
        self._thread.start()
        self._ready.wait()
        if self._store is None:
            self._join()
        return self

    def close(self) -> None:
        """Commit what is open, and end the thread. Again: does nothing."""
        if self._thread is None:
            return
        if self._token is not None and self._closing is not None:
            self._token.run_sync_soon(self._closing.set)
        self._join()

    def _join(self) -> None:
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _run(self) -> None:
        try:
            trio.run(self._serve)
        except BaseException as error:
            self._failure = error
        finally:
            self._store = None
            self._ready.set()

    async def _serve(self) -> None:
        async with CrailStore.connect(self._config, uid=self._uid, gid=self._gid) as store:
            self._token = trio.lowlevel.current_trio_token()
            self._closing = trio.Event()
            self._store = store
            self._ready.set()
            await self._closing.wait()
            self._store = None

    def __enter__(self) -> BlockingStore:
        return self.open()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _call(self, operation: Callable[[CrailStore], Awaitable[T]]) -> T:
        store, token = self._store, self._token
        if store is None or token is None:
            raise InvalidError("this store is closed: open it first")
        try:
            return trio.from_thread.run(operation, store, trio_token=token)
        except (trio.RunFinishedError, trio.Cancelled):
            raise InvalidError("the store was closed during the call") from None

    # --- names ------------------------------------------------------------------------------

    def lookup(self, path: Path, *, follow: bool = True) -> Attributes:
        return self._call(lambda store: store.lookup(path, follow=follow))

    def exists(self, path: Path) -> bool:
        return self._call(lambda store: store.exists(path))

    def list(self, path: Path) -> list[Entry]:
        return self._call(lambda store: store.list(path))

    def mkdir(
        self,
        path: Path,
        *,
        kind: NodeKind = NodeKind.DIRECTORY,
        mode: int = 0o755,
        parents: bool = False,
        exist_ok: bool = False,
        storage_class: StorageClass | None = None,
        location: str | None = None,
    ) -> Attributes:
        return self._call(
            lambda store: store.mkdir(
                path,
                kind=kind,
                mode=mode,
                parents=parents,
                exist_ok=exist_ok,
                storage_class=storage_class,
                location=location,
            )
        )

    def rename(self, path: Path, new_path: Path, *, replace: bool = True) -> None:
        self._call(lambda store: store.rename(path, new_path, replace=replace))

    def symlink(self, path: Path, target: Path) -> None:
        self._call(lambda store: store.symlink(path, target))

    def delete(self, path: Path, *, recursive: bool = False) -> None:
        self._call(lambda store: store.delete(path, recursive=recursive))

    # --- files ------------------------------------------------------------------------------

    def create(
        self,
        path: Path,
        *,
        mode: int = 0o644,
        exclusive: bool = False,
        storage_class: StorageClass | None = None,
        location: str | None = None,
        durability: Durability | None = None,
    ) -> BlockingFile:
        file = self._call(
            lambda store: store.create(
                path,
                mode=mode,
                exclusive=exclusive,
                storage_class=storage_class,
                location=location,
                durability=durability,
            )
        )
        return BlockingFile(self, file)

    def open_file(self, path: Path) -> BlockingFile:
        """``CrailStore.open``."""
        return BlockingFile(self, self._call(lambda store: store.open(path)))

    def read(self, path: Path, offset: int = 0, byte_count: int = -1) -> bytes:
        return self._call(lambda store: store.read(path, offset, byte_count))

    def write(self, path: Path, data: Buffer) -> None:
        self._call(lambda store: store.write(path, data))

    # --- containers -------------------------------------------------------------------------

    def read_multifile(self, path: Path) -> bytes:
        """All bytes of a multifile's files, in name order."""
        return self._call(lambda store: _read_multifile(store, path))

    def put(self, table: Path, key: str | bytes, value: Buffer, *, mode: int = 0o644) -> None:
        self._call(lambda store: store.put(table, key, value, mode=mode))

    def get(self, table: Path, key: str | bytes) -> bytes:
        return self._call(lambda store: store.get(table, key))

    def delete_key(self, table: Path, key: str | bytes) -> None:
        self._call(lambda store: store.delete_key(table, key))

    def keys(self, table: Path) -> Names:
        return self._call(lambda store: store.keys(table))

    # --- placement and space ----------------------------------------------------------------

    def set_class(self, path: Path, storage_class: StorageClass | str) -> None:
        self._call(lambda store: store.set_class(path, storage_class))

    def get_class(self, path: Path) -> StorageClass:
        return self._call(lambda store: store.get_class(path))

    def statistics(self) -> Statistics:
        return self._call(lambda store: store.statistics())


class BlockingFile:
    """As ``StoreFile``, method by method; usable with ``with``."""

    def __init__(self, store: BlockingStore, file: StoreFile) -> None:
        self._store = store
        self._file = file

    @property
    def size(self) -> int:
        return self._file.size

    @property
    def position(self) -> int:
        return self._file.position

    @position.setter
    def position(self, offset: int) -> None:
        self._file.position = offset

    def read(self, byte_count: int = -1) -> bytes:
        return self._call(lambda: self._file.read(byte_count))

    def read_at(self, offset: int, byte_count: int) -> bytes:
        return self._call(lambda: self._file.read_at(offset, byte_count))

    def readinto(self, buffer: bytearray | memoryview) -> int:
        return self._call(lambda: self._file.readinto(buffer))

    def write(self, data: Buffer) -> None:
        self._call(lambda: self._file.write(data))

    def write_at(self, offset: int, data: Buffer) -> None:
        self._call(lambda: self._file.write_at(offset, data))

    def append(self, data: Buffer) -> int:
        return self._call(lambda: self._file.append(data))

    def truncate(self, size: int) -> None:
        self._call(lambda: self._file.truncate(size))

    def flush(self) -> None:
        self._call(self._file.flush)

    def sync(self) -> None:
        self._call(self._file.sync)

    def close(self) -> None:
        self._call(self._file.close)

    def __enter__(self) -> BlockingFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._call(lambda: self._file.__aexit__(kind, error, traceback))

    def _call(self, operation: Callable[[], Awaitable[T]]) -> T:
        return self._store._call(lambda store: operation())


async def _read_multifile(store: CrailStore, path: Path) -> bytes:
    async with await store.open_multifile(path) as reader:
        return b"".join([piece async for piece in reader])
