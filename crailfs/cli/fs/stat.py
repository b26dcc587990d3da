"""``crail fs stat``"""

from __future__ import annotations

import argparse
import json
import stat
from typing import TYPE_CHECKING, Any

from crailfs.cli.exit_codes import ExitCode
from crailfs.cli.fs.listing import printable
from crailfs.cli.fs.paths import about

if TYPE_CHECKING:
    from crailfs.client.store import CrailStore


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")


async def run(store: CrailStore, options: argparse.Namespace) -> int:
    with about(options.path):
        node = await store.lookup(options.path, follow=False)
    placement = node.placement
    shown: dict[str, Any] = {
        "path": options.path,
        "inode": node.ino,
        "kind": node.kind.name.lower(),
        "mode": stat.filemode(node.st_mode),
        "uid": node.uid,
        "gid": node.gid,
        "links": node.nlink,
        "size": node.size,
        "allocated_bytes": node.block_count * store.filesystem.block_size_bytes,
        "mtime_ns": node.mtime_ns,
        "ctime_ns": node.ctime_ns,
        "atime_ns": node.atime_ns,
        "birth_ns": node.btime_ns,
        "storage_class": str(placement.storage_class),
        "location": placement.location,
        "durability": placement.durability.name.lower(),
        "allocation_bytes": placement.allocation_blocks * store.filesystem.block_size_bytes,
        "replicas": placement.replicas,
        "target": printable(node.target),
    }
    if options.json:
        print(json.dumps(shown, indent=2))
    else:
        for name, value in shown.items():
            if value != "":
                print(f"{name:<16} {value}")
    return ExitCode.OK
