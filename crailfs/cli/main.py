"""The ``crail`` command: finds the subcommand, imports only that, and turns errors into one line
and an exit code.

A subcommand is a module of this package with ``EXAMPLES`` (text), ``add_arguments(parser)`` and
``run(options) -> int``.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from crailfs.errors import CrailError

SUBCOMMANDS: Final = {
    "up": "start a file system on this host and mount it, with one command",
    "down": "unmount it and stop its processes; the data stays",
    "status": "servers, tiers, capacity and use",
    "fs": "list, copy, remove and inspect files without a mount",
    "top": "live counters",
    "fsck": "check the name space, and with --data every byte",
    "bench": "measure directories and the store API",
    "mount": "mount a cluster's file system (foreground)",
    "umount": "unmount a file system, also one whose process has died",
    "metadata": "run a metadata server (foreground)",
    "storage": "run a storage server (foreground)",
}
"""Name and one line each; the module of the same name has the rest."""

_TOP_LEVEL_EXAMPLES: Final = """\
examples:
  crail up /mnt/crail                 a file system from this machine's memory and disk
  crail status
  crail fs put results.parquet /results.parquet
  crail down /mnt/crail               stop it; `crail up /mnt/crail` finds the data again
  crail up --help                     more about one command

exit codes: 0 ok, 1 operation failed, 2 usage or configuration, 3 not running or unreachable,
4 busy, 5 refused by the server, 6 damage found, 130 interrupted
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one ``crail`` command line; the exit code (see ``crailfs.cli.exit_codes``)."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] not in SUBCOMMANDS:
        return _top_level(given)
    name = given[0]
    module = importlib.import_module(f"crailfs.cli.{name}")
    parser = argparse.ArgumentParser(
        prog=f"crail {name}",
        description=f"{SUBCOMMANDS[name]}.".capitalize(),
        epilog=f"examples:\n{module.EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    options = parser.parse_args(given[1:])
    try:
        from crailfs.cli.logs import set_up_logging

        # What a command has to say is its output and its one line of error.
        set_up_logging("error")
        code = int(module.run(options))
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of our output has gone (`crail fs ls | head`): nobody is left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Exception, BaseExceptionGroup, KeyboardInterrupt) as error:
        if _is_interrupt(error):
            return 130
        known = error_of(error)
        if known is None:
            raise
        from crailfs.cli.exit_codes import exit_code_of

        print(f"crail {name}: {known.message}", file=sys.stderr)
        return int(exit_code_of(known))
    return code


def error_of(error: BaseException) -> CrailError | None:
    """The error to show: the first that is ours, inside trio's groups too; an ``OSError`` as text.
    None: a defect of the program, which shows its traceback."""
    from crailfs.errors import CrailError

    if isinstance(error, CrailError):
        return error
    if isinstance(error, BaseExceptionGroup):
        return next((found for each in error.exceptions if (found := error_of(each))), None)
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return CrailError(f"{where}{error.strerror}")
    return None


def _is_interrupt(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return error.subgroup(KeyboardInterrupt) is not None
    return isinstance(error, KeyboardInterrupt)


def _top_level(given: list[str]) -> int:
    listing = "\n".join(f"  {name:<10}{line}" for name, line in SUBCOMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="crail",
        usage="crail COMMAND ...",
        description=f"CrailFS: a distributed, tiered file system.\n\ncommands:\n{listing}",
        epilog=_TOP_LEVEL_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    options, rest = parser.parse_known_args(given)
    if options.version:
        from importlib.metadata import version

        print(f"crail {version('crailfs')}")
        return 0
    if not rest:
        parser.print_help(sys.stderr)
        return 2
    near = difflib.get_close_matches(rest[0], SUBCOMMANDS, n=1)
    hint = f"did you mean '{near[0]}'?" if near else "see `crail --help`"
    print(f"crail: there is no command '{rest[0]}': {hint}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
