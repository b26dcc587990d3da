"""``crail fs tree``"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from crailfs.cli.exit_codes import ExitCode
from crailfs.cli.fs.listing import long_line, marked, printable
from crailfs.cli.fs.paths import about
from crailfs.cli.walk import walk
from crailfs.units import format_bytes

if TYPE_CHECKING:
    from crailfs.client.store import CrailStore


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", nargs="?", default="/")
    parser.add_argument(
        "-l", dest="long", action="store_true", help="mode, owner, size, time, class"
    )


async def run(store: CrailStore, options: argparse.Namespace) -> int:
    with about(options.path):
        top = await store.lookup(options.path)
    directory_count, other_count, byte_count = 0, 0, 0
    async for path, node in walk(store.filesystem, top.ino):
        depth = path.count(b"/") - 1
        name = "  " * depth + marked(printable(path.rpartition(b"/")[2]), node)
        print(long_line(name, node) if options.long else name)
        if node.is_directory:
            directory_count += 1
        else:
            other_count += 1
            byte_count += node.size
    print(f"{directory_count} directories, {other_count} files, {format_bytes(byte_count)}")
    return ExitCode.OK
