"""``crail fs mkdir``"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from crailfs.cli.exit_codes import ExitCode
from crailfs.cli.fs.paths import about
from crailfs.cli.fs.permissions import creation_mode
from crailfs.errors import ExistsError
from crailfs.records import NodeKind, StorageClass

if TYPE_CHECKING:
    from crailfs.client.store import CrailStore

_KINDS = {
    "directory": NodeKind.DIRECTORY,
    "multifile": NodeKind.MULTIFILE,
    "table": NodeKind.TABLE,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH")
    parser.add_argument(
        "-p",
        dest="parents",
        action="store_true",
        help="make the directories above it too; that it exists is no error",
    )
    parser.add_argument(
        "--kind",
        choices=_KINDS,
        default="directory",
        help="multifile: files that can be read as one stream; table: key-values (see kv)",
    )
    parser.add_argument(
        "--class",
        dest="storage_class",
        metavar="CLASS",
        help="the tiers for what is made in it: any, memory, memory>disk, ... (see setclass)",
    )


async def run(store: CrailStore, options: argparse.Namespace) -> int:
    storage_class = StorageClass.parse(options.storage_class) if options.storage_class else None
    kind = _KINDS[options.kind]
    with about(options.path):
        if options.parents and await store.exists(options.path):
            if (await store.lookup(options.path)).kind is kind:
                return ExitCode.OK
            raise ExistsError(options.path)
        await store.mkdir(
            options.path,
            kind=kind,
            mode=creation_mode(0o777),
            parents=options.parents,
            storage_class=storage_class,
        )
    return ExitCode.OK
