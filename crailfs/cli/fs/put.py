"""``crail fs put``"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import trio

from crailfs.cli.exit_codes import ExitCode
from crailfs.cli.fs.paths import Place, find, place
from crailfs.cli.fs.permissions import creation_mode
from crailfs.errors import ExistsError, IsADirectoryCrailError, NotFoundError
from crailfs.records import NodeKind
from crailfs.units import MIB

if TYPE_CHECKING:
    from crailfs.client.filesystem import FileSystem

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


async def run(file_system: FileSystem, options: argparse.Namespace) -> int:
    if options.local == "-":
        source = trio.wrap_file(sys.stdin.buffer)
        await _put(file_system, source, await _target(file_system, options), options)
    else:
        async with await trio.open_file(options.local, "rb") as source:
            await _put(file_system, source, await _target(file_system, options), options)
    return ExitCode.OK


async def _target(file_system: FileSystem, options: argparse.Namespace) -> Place:
    try:
        node = await find(file_system, options.path)
    except NotFoundError:
        return await place(file_system, options.path)
    if not node.is_directory:
        return await place(file_system, options.path)
    if options.local == "-":
        raise IsADirectoryCrailError(f"{options.path} is a directory: name a file in it")
    return Place(node.ino, os.fsencode(Path(options.local).name))


async def _put(
    file_system: FileSystem, source: AsyncReader, target: Place, options: argparse.Namespace
) -> None:
    try:
        reply = await file_system.create_node(
            target.parent,
            target.name,
            NodeKind.FILE,
            mode=creation_mode(0o666),
            uid=os.geteuid(),
            gid=os.getegid(),
            exclusive=options.no_replace,
        )
    except ExistsError:
        raise ExistsError(f"{options.path} exists: leave --no-replace out to replace it") from None
    file = await file_system.open(reply.attributes.ino, truncate=not reply.created)
    try:
        offset = 0
        while piece := await source.read(_PIECE_BYTES):
            await file.write(offset, piece)
            offset += len(piece)
    finally:
        await file.close()
