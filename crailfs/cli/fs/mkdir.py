"""``crail fs mkdir``"""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from crailfs.cli.exit_codes import ExitCode
from crailfs.cli.fs.paths import names_of, place
from crailfs.cli.fs.permissions import creation_mode
from crailfs.errors import ExistsError
from crailfs.records import NodeKind, StorageClass

if TYPE_CHECKING:
    from crailfs.client.filesystem import FileSystem

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


async def run(file_system: FileSystem, options: argparse.Namespace) -> int:
    storage_class = StorageClass.parse(options.storage_class) if options.storage_class else None
    if options.parents:
        names = names_of(options.path)
        for depth in range(1, len(names)):
            above = "/" + os.fsdecode(b"/".join(names[:depth]))
            await _make(file_system, above, NodeKind.DIRECTORY, None, may_exist=True)
    kind = _KINDS[options.kind]
    await _make(file_system, options.path, kind, storage_class, may_exist=options.parents)
    return ExitCode.OK


async def _make(
    file_system: FileSystem,
    path: str,
    kind: NodeKind,
    storage_class: StorageClass | None,
    *,
    may_exist: bool,
) -> None:
    target = await place(file_system, path)
    try:
        await file_system.create_node(
            target.parent,
            target.name,
            kind,
            mode=creation_mode(0o777),
            uid=os.geteuid(),
            gid=os.getegid(),
            storage_class=storage_class,
        )
    except ExistsError:
        if may_exist and (await file_system.lookup(target.parent, target.name)).kind is kind:
            return
        raise ExistsError(f"{path} exists") from None
