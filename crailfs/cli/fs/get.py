"""``crail fs get``"""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING, Protocol

import trio

from crailfs.cli.exit_codes import ExitCode
from crailfs.cli.fs.paths import find, names_of
from crailfs.units import MIB

if TYPE_CHECKING:
    from crailfs.client.filesystem import FileSystem
    from crailfs.client.open_file import OpenFile

_PIECE_BYTES = 4 * MIB


class AsyncWriter(Protocol):
    async def write(self, data: bytes, /) -> int: ...
    async def flush(self) -> None: ...


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH")
    parser.add_argument("local", metavar="LOCAL", help="a file, a directory, or - for stdout")


async def run(file_system: FileSystem, options: argparse.Namespace) -> int:
    node = await find(file_system, options.path)
    # Opened first: what is no file is refused before anything local is touched.
    file = await file_system.open(node.ino)
    try:
        if options.local == "-":
            await _copy(file, trio.wrap_file(sys.stdout.buffer))
        else:
            local = trio.Path(options.local)
            if await local.is_dir():
                local /= os.fsdecode(names_of(options.path)[-1])
            async with await local.open("wb") as target:
                await _copy(file, target)
    finally:
        await file.close()
    return ExitCode.OK


async def _copy(file: OpenFile, target: AsyncWriter) -> None:
    offset = 0
    while piece := await file.read(offset, _PIECE_BYTES):
        offset += len(piece)
        # In a thread, so that a slow reader of our output does not cost us the session; the piece
        # may be a view of the region, which is only good until the next await.
        await target.write(bytes(piece))
    await target.flush()
