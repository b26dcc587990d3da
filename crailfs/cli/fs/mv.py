"""``crail fs mv``"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from crailfs.cli.exit_codes import ExitCode
from crailfs.cli.fs.paths import Place, find, place
from crailfs.errors import NotFoundError

if TYPE_CHECKING:
    from crailfs.client.filesystem import FileSystem


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="FROM")
    parser.add_argument("target", metavar="TO", help="a new name, or an existing directory")
    parser.add_argument("--no-replace", action="store_true", help="fail if TO exists")


async def run(file_system: FileSystem, options: argparse.Namespace) -> int:
    from crailfs.wire.messages import RenameFlag

    await find(file_system, options.source)
    source = await place(file_system, options.source)
    try:
        existing = await find(file_system, options.target)
    except NotFoundError:
        existing = None
    if existing is not None and existing.is_directory:
        target = Place(existing.ino, source.name)
    else:
        target = await place(file_system, options.target)
    flags = RenameFlag.NO_REPLACE if options.no_replace else RenameFlag.NONE
    await file_system.rename(source.parent, source.name, target.parent, target.name, flags)
    return ExitCode.OK
