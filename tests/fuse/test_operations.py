"""The adapter, awaited without a mount: requests as the kernel sends them, on a whole cluster."""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyfuse3
import pytest

from crailfs.client.filesystem import FileSystem
from crailfs.client.open_file import OpenFile
from crailfs.errors import ChecksumError
from crailfs.records import NodeKind
from crailfs.units import ROOT_INODE
from crailfs.wire.messages import Invalidation
from fuse_client.directories import DirectoryReader
from fuse_client.invalidation import DirectoryChanges
from fuse_client.operations import Operations
from tests.support.cluster import running_cluster

ROOT: Any = SimpleNamespace(uid=0, gid=0, pid=1, umask=0o022)
USER: Any = SimpleNamespace(uid=1234, gid=5678, pid=1, umask=0o022)


@asynccontextmanager
async def adapter(directory: Path) -> AsyncIterator[tuple[Operations, FileSystem]]:
    async with running_cluster(directory) as cluster, cluster.client() as file_system:
        yield Operations(file_system, DirectoryChanges()), file_system


async def create(operations: Operations, name: bytes, data: bytes = b"") -> int:
    """A closed file with this content; its inode."""
    info, entry = await operations.create(ROOT_INODE, name, 0o644, os.O_WRONLY, ROOT)
    if data:
        assert await operations.write(info.fh, 0, data) == len(data)
    await operations.flush(info.fh)
    await operations.release(info.fh)
    return entry.st_ino


def errno_of(caught: pytest.ExceptionInfo[pyfuse3.FUSEError]) -> int:
    return caught.value.errno


async def test_an_entry_says_what_the_node_is_and_how_long_that_holds(tmp_path: Path) -> None:
    async with adapter(tmp_path) as (operations, _):
        _, made = await operations.create(ROOT_INODE, b"file", 0o640, os.O_RDWR, USER)
        assert made.st_mode == stat.S_IFREG | 0o640
        assert (made.st_uid, made.st_gid, made.st_nlink) == (1234, 5678, 1)
        found = await operations.lookup(ROOT_INODE, b"file", ROOT)
        assert found.st_ino == made.st_ino
        assert 4 < found.entry_timeout <= 5
        assert 4 < found.attr_timeout <= 5


async def test_a_missing_name_is_an_entry_that_may_be_remembered(tmp_path: Path) -> None:
    async with adapter(tmp_path) as (operations, _):
        entry = await operations.lookup(ROOT_INODE, b"missing", ROOT)
        assert entry.st_ino == 0
        assert 4 < entry.entry_timeout <= 5


async def test_errors_become_their_errno(tmp_path: Path) -> None:
    async with adapter(tmp_path) as (operations, _):
        await create(operations, b"file")
        for call, number in (
            (operations.mkdir(ROOT_INODE, b"file", 0o755, ROOT), errno.EEXIST),
            (operations.rmdir(ROOT_INODE, b"file", ROOT), errno.ENOTDIR),
            (operations.unlink(ROOT_INODE, b"missing", ROOT), errno.ENOENT),
            (operations.getattr(999, ROOT), errno.ESTALE),
            (operations.lookup(ROOT_INODE, b"n" * 256, ROOT), errno.ENAMETOOLONG),
            (operations.read(77, 0, 1), errno.EBADF),
        ):
            with pytest.raises(pyfuse3.FUSEError) as caught:
                await call
            assert errno_of(caught) == number


async def test_wrong_bytes_are_an_io_error_with_a_line_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def wrong(*_: object) -> bytes:
        raise ChecksumError("block 7 is not what was written")

    async with adapter(tmp_path) as (operations, _):
        info = await operations.open(await create(operations, b"file"), os.O_RDONLY, ROOT)
        monkeypatch.setattr(OpenFile, "read", wrong)
        with pytest.raises(pyfuse3.FUSEError) as caught:
            await operations.read(info.fh, 0, 1)
        assert errno_of(caught) == errno.EIO
        assert "block 7 is not what was written" in caplog.text


async def test_a_bug_is_an_io_error_with_a_trace_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(*_: object) -> None:
        raise KeyError("what nobody thought of")

    async with adapter(tmp_path) as (operations, file_system):
        monkeypatch.setattr(file_system, "attributes", broken)
        with caplog.at_level(logging.ERROR), pytest.raises(pyfuse3.FUSEError) as caught:
            await operations.getattr(ROOT_INODE, ROOT)
        assert errno_of(caught) == errno.EIO
        assert "what nobody thought of" in caplog.text


async def test_the_page_cache_is_kept_while_the_bytes_are_the_same(tmp_path: Path) -> None:
    async with adapter(tmp_path) as (operations, file_system):
        ino = await create(operations, b"file", b"x" * 100_000)

        async def keeps() -> bool:
            info = await operations.open(ino, os.O_RDONLY, ROOT)
            await operations.flush(info.fh)
            await operations.release(info.fh)
            return bool(info.keep_cache)

        assert await keeps()  # written through this kernel's page cache
        assert await keeps()
        async with await file_system.open(ino) as elsewhere:  # past the adapter: not in the cache
            await elsewhere.write(0, b"y")
        assert not await keeps()
        assert await keeps()
        operations.forget_pages((Invalidation(ino, b"", False),))
        assert not await keeps()
        await operations.forget([(ino, 1)])
        assert not await keeps()


async def test_closing_a_handle_that_only_reads_commits_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[int] = []

    async def note(file: OpenFile) -> None:
        flushed.append(file.ino)

    async with adapter(tmp_path) as (operations, _):
        ino = await create(operations, b"file", b"x")
        reading = await operations.open(ino, os.O_RDONLY, ROOT)
        writing = await operations.open(ino, os.O_RDWR, ROOT)
        with monkeypatch.context() as patch:
            patch.setattr(OpenFile, "flush", note)
            await operations.flush(reading.fh)
            assert flushed == []
            await operations.flush(writing.fh)
            assert flushed == [ino]


async def test_open_files_are_committed_when_the_mount_ends(tmp_path: Path) -> None:
    async with running_cluster(tmp_path) as cluster:
        async with cluster.client() as file_system:
            operations = Operations(file_system, DirectoryChanges())
            info, entry = await operations.create(ROOT_INODE, b"file", 0o644, os.O_WRONLY, ROOT)
            await operations.write(info.fh, 0, b"written, not closed")
            await operations.close_files()
        async with cluster.client() as file_system, await file_system.open(entry.st_ino) as file:
            assert bytes(await file.read(0, 100)) == b"written, not closed"


async def test_listing_goes_on_exactly_where_it_was(tmp_path: Path) -> None:
    async with adapter(tmp_path) as (_, file_system):
        names = [b"%04d" % number for number in range(2500)]
        for name in names:
            await file_system.create_node(ROOT_INODE, name, NodeKind.FIFO, mode=0o600, uid=0, gid=0)
        reader = DirectoryReader(ROOT_INODE, file_system)
        seen: list[bytes] = []
        while entries := await reader.entries_from(len(seen)):
            taken = entries[:300]  # as many as fit into the kernel's buffer
            seen += [entry.name for entry in taken]
            await file_system.create_node(
                ROOT_INODE, taken[0].name + b"x", NodeKind.FIFO, mode=0o600, uid=0, gid=0
            )
            if len(seen) > 1000:
                await file_system.remove(ROOT_INODE, seen[-500], directory=False)
        assert seen[:2] == [b".", b".."]
        assert [name for name in seen if len(name) == 4] == names
        # Back to a place on a page that is gone, and to the start.
        again = await reader.entries_from(1100)
        assert again[0].name > seen[1099]
        assert (await reader.entries_from(1))[0].name == b".."
        assert [entry.name for entry in await reader.entries_from(0)] == [b".", b".."]


async def test_a_directory_removed_while_it_is_read_just_ends(tmp_path: Path) -> None:
    async with adapter(tmp_path) as (operations, file_system):
        made = await operations.mkdir(ROOT_INODE, b"directory", 0o755, ROOT)
        reader = DirectoryReader(made.st_ino, file_system)
        assert len(await reader.entries_from(0)) == 2
        await operations.rmdir(ROOT_INODE, b"directory", ROOT)
        assert await reader.entries_from(2) == ()
        assert await reader.entries_from(0) == ()
        # Whoever is still inside finds a directory without links.
        assert (await operations.getattr(made.st_ino, ROOT)).st_nlink == 0
        await operations.forget([(made.st_ino, 1)])
        with pytest.raises(pyfuse3.FUSEError) as caught:
            await operations.getattr(made.st_ino, ROOT)
        assert errno_of(caught) == errno.ESTALE
