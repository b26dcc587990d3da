"""``crail umount``: unmount a file system that ``crail mount`` mounted."""

from __future__ import annotations

import argparse
from pathlib import Path

from crailfs.cli.exit_codes import ExitCode
from crailfs.embedded import registry
from crailfs.embedded.mountpoint import unmount

EXAMPLES = """\
  crail umount /crail            what was written is committed first
  crail umount /crail --force    also while programs use it: they get errors
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("mountpoint", metavar="MOUNTPOINT")
    parser.add_argument("--force", action="store_true", help="unmount even while it is in use")


def run(options: argparse.Namespace) -> int:
    unmount(registry.absolute(Path(options.mountpoint)), force=options.force)
    return ExitCode.OK
