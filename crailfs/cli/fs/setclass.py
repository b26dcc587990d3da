"""``crail fs setclass``"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from crailfs.cli.exit_codes import ExitCode
from crailfs.cli.fs.paths import about
from crailfs.records import StorageClass

if TYPE_CHECKING:
    from crailfs.client.store import CrailStore


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH")
    parser.add_argument(
        "storage_class",
        metavar="CLASS",
        help="any; one tier (pmem, memory, nvme, disk); or fast>slow, to fall through from one "
        "down to the other. Blocks that are written already stay where they are",
    )
    parser.add_argument("--location", metavar="HOST", help="and prefer this host or rack")


async def run(store: CrailStore, options: argparse.Namespace) -> int:
    storage_class = StorageClass.parse(options.storage_class)
    with about(options.path):
        node = await store.lookup(options.path)
    await store.set_class(options.path, storage_class)
    if options.location is not None:
        location = options.location.encode()
        await store.filesystem.set_xattr(node.ino, b"user.crail.location", location)
    return ExitCode.OK
