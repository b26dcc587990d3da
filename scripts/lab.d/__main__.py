"""scripts/lab: tests against PMem, NVMe and RDMA."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import image
import runs

RESULTS = image.CHECKOUT / "build/lab"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/lab", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("run", "run a pytest selection in a guest"),
        ("exec", "run any command in a guest, from the checkout's copy there"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("--guests", type=int, choices=(1, 2), default=1)
        command.add_argument("--name", default=name, help="names the results")
        command.add_argument("--limit", type=float, default=900, metavar="SECONDS")
        command.add_argument("--fsdax", action="store_true", help="a second NVDIMM on /mnt/pmem")
        command.add_argument("--results", type=Path, default=RESULTS)
        command.add_argument("arguments", nargs="+", metavar="-- ARGUMENTS")
    command = commands.add_parser("image", help="make the image")
    command.add_argument("--rebuild", action="store_true")
    return parser


def main() -> int:
    arguments = _parser().parse_args()
    if arguments.command == "image":
        print(image.ensure(rebuild=arguments.rebuild).directory)
        return 0
    run = runs.Run(
        arguments.name,
        arguments.guests,
        arguments.arguments,
        arguments.limit,
        arguments.fsdax,
        arguments.command == "exec",
    )
    return runs.in_guests(image.ensure(), run, arguments.results)


if __name__ == "__main__":
    sys.exit(main())
