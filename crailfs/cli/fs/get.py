"""``crail fs get``"""

from __future__ import annotations

import argparse
import sys
from collections.abc import AsyncIterator
from pathlib import PurePath
from typing import TYPE_CHECKING, Protocol

import trio

from crailfs.cli.exit_codes import ExitCode
from crailfs.cli.fs.paths import about
from crailfs.errors import IsADirectoryCrailError
from crailfs.records import NodeKind

if TYPE_CHECKING:
    from crailfs.client.store import CrailStore


class AsyncWriter(Protocol):
    """Writes in a thread: a slow reader of our output does not cost us the session."""

    async def write(self, data: bytes, /) -> int: ...
    async def flush(self) -> None: ...


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="a file, or a multifile: all of its files")
    parser.add_argument("local", metavar="LOCAL", help="a file, a directory, or - for stdout")


async def run(store: CrailStore, options: argparse.Namespace) -> int:
    # What is no file is refused before anything local is touched.
    with about(options.path):
        node = await store.lookup(options.path)
    if node.is_directory and node.kind is not NodeKind.MULTIFILE:
        raise IsADirectoryCrailError(f"{options.path} is a directory: name a file in it")
    pieces = _multifile(store, options.path) if node.is_directory else _file(store, options.path)
    if options.local == "-":
        await _copy(pieces, trio.wrap_file(sys.stdout.buffer))
        return ExitCode.OK
    local = trio.Path(options.local)
    if await local.is_dir():
        local /= PurePath(options.path).name
    async with await local.open("wb") as target:
        await _copy(pieces, target)
    return ExitCode.OK


async def _file(store: CrailStore, path: str) -> AsyncIterator[bytes]:
    async with await store.open(path) as file:
        async for piece in file:
            yield piece


async def _multifile(store: CrailStore, path: str) -> AsyncIterator[bytes]:
    async with await store.open_multifile(path) as reader:
        while piece := await reader.read():
            yield piece


async def _copy(pieces: AsyncIterator[bytes], target: AsyncWriter) -> None:
    async for piece in pieces:
        await target.write(piece)
    await target.flush()
