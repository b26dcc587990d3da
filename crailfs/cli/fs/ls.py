"""``crail fs ls``"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from crailfs.cli.exit_codes import ExitCode
from crailfs.cli.fs.listing import long_line, marked, printable
from crailfs.cli.fs.paths import find

if TYPE_CHECKING:
    from crailfs.client.filesystem import FileSystem


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", nargs="?", default="/")
    parser.add_argument(
        "-l", dest="long", action="store_true", help="mode, owner, size, time, class"
    )


async def run(file_system: FileSystem, options: argparse.Namespace) -> int:
    node = await find(file_system, options.path)
    if not node.is_directory:
        print(long_line(options.path, node) if options.long else options.path)
        return ExitCode.OK
    after_name = b""
    while True:
        page = await file_system.read_directory(node.ino, after_name)
        for entry in page.entries:
            name = marked(printable(entry.name), entry.attributes)
            print(long_line(name, entry.attributes) if options.long else name)
        if page.complete:
            return ExitCode.OK
        after_name = page.entries[-1].name
