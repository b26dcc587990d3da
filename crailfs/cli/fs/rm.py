"""``crail fs rm``"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from crailfs.cli.exit_codes import ExitCode
from crailfs.cli.fs.paths import about
from crailfs.errors import IsADirectoryCrailError, NotFoundError

if TYPE_CHECKING:
    from crailfs.client.store import CrailStore


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", metavar="PATH", nargs="+")
    parser.add_argument("-r", dest="recursive", action="store_true", help="directories too")
    parser.add_argument("-f", dest="force", action="store_true", help="what is missing is no error")


async def run(store: CrailStore, options: argparse.Namespace) -> int:
    for path in options.paths:
        try:
            with about(path):
                node = await store.lookup(path, follow=False)
                if not node.is_directory or options.recursive:
                    await store.delete(path, recursive=True)
                    continue
        except NotFoundError:
            if not options.force:
                raise
            continue
        raise IsADirectoryCrailError(f"{path} is a directory: -r removes it with all in it")
    return ExitCode.OK
