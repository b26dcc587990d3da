"""``crail fs mv``"""

from __future__ import annotations

import argparse
from pathlib import PurePath
from typing import TYPE_CHECKING

from crailfs.cli.exit_codes import ExitCode
from crailfs.cli.fs.paths import about
from crailfs.errors import NotFoundError

if TYPE_CHECKING:
    from crailfs.client.store import CrailStore


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="FROM")
    parser.add_argument("target", metavar="TO", help="a new name, or an existing directory")
    parser.add_argument("--no-replace", action="store_true", help="fail if TO exists")


async def run(store: CrailStore, options: argparse.Namespace) -> int:
    with about(options.source):
        await store.lookup(options.source, follow=False)
    target = options.target
    try:
        if (await store.lookup(target)).is_directory:
            target = f"{target}/{PurePath(options.source).name}"
    except NotFoundError:
        pass  # a new name
    with about(target):
        await store.rename(options.source, target, replace=not options.no_replace)
    return ExitCode.OK
