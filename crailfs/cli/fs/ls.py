"""``crail fs ls``"""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from crailfs.cli.exit_codes import ExitCode
from crailfs.cli.fs.listing import long_line, marked, printable
from crailfs.cli.fs.paths import about

if TYPE_CHECKING:
    from crailfs.client.store import CrailStore


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", nargs="?", default="/")
    parser.add_argument(
        "-l", dest="long", action="store_true", help="mode, owner, size, time, class"
    )


async def run(store: CrailStore, options: argparse.Namespace) -> int:
    with about(options.path):
        node = await store.lookup(options.path)
    if not node.is_directory:
        print(long_line(options.path, node) if options.long else options.path)
        return ExitCode.OK
    async for entry in store.scan(options.path):
        name = marked(printable(os.fsencode(entry.name)), entry.attributes)
        print(long_line(name, entry.attributes) if options.long else name)
    return ExitCode.OK
