"""``crail fs put``"""

from __future__ import annotations

import argparse
import sys
from pathlib import PurePath
from typing import TYPE_CHECKING, Protocol

import trio

from crailfs.cli.exit_codes import ExitCode
from crailfs.cli.fs.paths import about
from crailfs.cli.fs.permissions import creation_mode
from crailfs.errors import IsADirectoryCrailError, NotFoundError
from crailfs.units import MIB

if TYPE_CHECKING:
    from crailfs.client.store import CrailStore

_PIECE_BYTES = 4 * MIB


class AsyncReader(Protocol):
    """Reads in a thread: a slow source does not cost us the session."""

    async def read(self, byte_count: int, /) -> bytes: ...


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("local", metavar="LOCAL", help="a file, or - for standard input")
    parser.add_argument("path", metavar="PATH", help="a file, or an existing directory")
    parser.add_argument(
        "--no-replace", action="store_true", help="fail if there is such a file already"
    )


async def run(store: CrailStore, options: argparse.Namespace) -> int:
    if options.local == "-":
        await _put(store, trio.wrap_file(sys.stdin.buffer), options)
    else:
        async with await trio.open_file(options.local, "rb") as source:
            await _put(store, source, options)
    return ExitCode.OK


async def _put(store: CrailStore, source: AsyncReader, options: argparse.Namespace) -> None:
    path = await _target(store, options)
    with about(path):
        file = await store.create(path, mode=creation_mode(0o666), exclusive=options.no_replace)
    async with file:
        while piece := await source.read(_PIECE_BYTES):
            await file.write(piece)


async def _target(store: CrailStore, options: argparse.Namespace) -> str:
    path: str = options.path
    try:
        with about(path):
            node = await store.lookup(path)
    except NotFoundError:
        return path
    if not node.is_directory:
        return path
    if options.local == "-":
        raise IsADirectoryCrailError(f"{path} is a directory: name a file in it")
    return f"{path}/{PurePath(options.local).name}"
