"""``crail fs``: the file system without a mount. One module a command, each with
``add_arguments(parser)`` and ``run(store, options) -> int``.
"""

from __future__ import annotations

import argparse
import importlib
import os
from typing import Final

from crailfs.cli.options import add_cluster_options, target_of

COMMANDS: Final = {
    "ls": "list a directory",
    "tree": "list everything below a directory",
    "stat": "all that is known of one node",
    "put": "copy a local file in",
    "get": "copy a file out",
    "rm": "remove files, with -r directories",
    "mv": "rename or move",
    "mkdir": "make a directory, or with --kind a container",
    "setclass": "say which tiers may hold a file's data, or a directory's new files'",
    "df": "space by tier",
    "kv": "put, get and list the values of a table",
}

EXAMPLES = """\
  crail fs ls -l /
  crail fs put results.parquet /results.parquet
  crail fs get /results.parquet - | sha256sum
  crail fs rm -r /tmp
  crail fs setclass /archive disk
  crail fs mkdir --kind table /settings; echo 42 | crail fs kv put /settings answer
  crail fs df --at /mnt/crail
paths are those of the file system, from its root, wherever it is mounted
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, line in COMMANDS.items():
        module = importlib.import_module(f"crailfs.cli.fs.{name}")
        command = commands.add_parser(
            name, help=line, description=f"{line.capitalize()}.", allow_abbrev=False
        )
        module.add_arguments(command)
        add_cluster_options(command)


def run(options: argparse.Namespace) -> int:
    import trio

    from crailfs.client.store import CrailStore

    module = importlib.import_module(f"crailfs.cli.fs.{options.command}")
    config = target_of(options).settings.client()

    async def connect_and_run() -> int:
        async with CrailStore.connect(config, uid=os.geteuid(), gid=os.getegid()) as store:
            return int(await module.run(store, options))

    return trio.run(connect_and_run)
