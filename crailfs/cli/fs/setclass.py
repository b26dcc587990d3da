"""``crail fs setclass``"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from crailfs.cli.exit_codes import ExitCode
from crailfs.cli.fs.paths import find
from crailfs.records import StorageClass

if TYPE_CHECKING:
    from crailfs.client.filesystem import FileSystem


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH")
    parser.add_argument(
        "storage_class",
        metavar="CLASS",
        help="any; one tier (pmem, memory, nvme, disk); or fast>slow, to fall through from one "
        "down to the other. Blocks that are written already stay where they are",
    )
    parser.add_argument("--location", metavar="HOST", help="and prefer this host or rack")


async def run(file_system: FileSystem, options: argparse.Namespace) -> int:
    storage_class = StorageClass.parse(options.storage_class)
    node = await find(file_system, options.path)
    await file_system.set_xattr(node.ino, b"user.crail.storage_class", str(storage_class).encode())
    if options.location is not None:
        await file_system.set_xattr(node.ino, b"user.crail.location", options.location.encode())
    return ExitCode.OK
