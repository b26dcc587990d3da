"""``crail fs rm``"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from crailfs.cli.exit_codes import ExitCode
from crailfs.cli.fs.paths import find, place
from crailfs.errors import IsADirectoryCrailError, NotEmptyError, NotFoundError

if TYPE_CHECKING:
    from crailfs.client.filesystem import FileSystem


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", metavar="PATH", nargs="+")
    parser.add_argument("-r", dest="recursive", action="store_true", help="directories too")
    parser.add_argument("-f", dest="force", action="store_true", help="what is missing is no error")


async def run(file_system: FileSystem, options: argparse.Namespace) -> int:
    for path in options.paths:
        try:
            node = await find(file_system, path)
        except NotFoundError:
            if options.force:
                continue
            raise
        target = await place(file_system, path)
        if node.is_directory:
            if not options.recursive:
                raise IsADirectoryCrailError(f"{path} is a directory: -r removes it with all in it")
            await _remove_below(file_system, node.ino, path)
        await file_system.remove(target.parent, target.name, directory=node.is_directory)
    return ExitCode.OK


async def _remove_below(file_system: FileSystem, directory: int, path: str) -> None:
    """Empty a directory. Each round begins with the first name again: what was listed is gone."""
    while True:
        page = await file_system.read_directory(directory)
        for entry in page.entries:
            is_directory = entry.attributes.is_directory
            if is_directory:
                await _remove_below(file_system, entry.attributes.ino, path)
            try:
                await file_system.remove(directory, entry.name, directory=is_directory)
            except NotFoundError:
                continue  # somebody else was faster
            except NotEmptyError as error:
                raise NotEmptyError(
                    f"{path}: somebody puts new files into it: try again"
                ) from error
        if page.complete:
            return
