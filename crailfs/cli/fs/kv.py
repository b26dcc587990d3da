"""``crail fs kv``: values of a table, each replaced as a whole."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

import trio

from crailfs.cli.exit_codes import ExitCode
from crailfs.cli.fs.listing import printable
from crailfs.cli.fs.paths import about
from crailfs.cli.fs.permissions import creation_mode
from crailfs.errors import ConfigurationError, NotFoundError, NotSupportedError
from crailfs.records import NodeKind
from crailfs.units import MIB

if TYPE_CHECKING:
    from crailfs.client.store import CrailStore

_VALUE_MAX_BYTES = 64 * MIB
"""A value is held in memory as a whole."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("put", "get", "ls", "rm"))
    parser.add_argument("table", metavar="TABLE", help="made by `crail fs mkdir --kind table`")
    parser.add_argument("key", metavar="KEY", nargs="?", help="not for ls")
    parser.add_argument(
        "value", metavar="VALUE", nargs="?", help="for put (default: standard input)"
    )


async def run(store: CrailStore, options: argparse.Namespace) -> int:
    with about(options.table):
        table = await store.lookup(options.table)
    if table.kind is not NodeKind.TABLE:
        raise NotSupportedError(
            f"{options.table} is no table: make one with `crail fs mkdir --kind table`"
        )
    if options.action == "ls":
        async for entry in store.scan(options.table):
            print(f"{entry.attributes.size:>12} {printable(os.fsencode(entry.name))}")
        return ExitCode.OK
    if options.key is None:
        raise ConfigurationError(f"kv {options.action}: a KEY is missing")
    if options.action == "put":
        value = await _value(options.value)
        await store.put(options.table, options.key, value, mode=creation_mode(0o666))
        return ExitCode.OK
    try:
        if options.action == "rm":
            await store.delete_key(options.table, options.key)
        else:
            sys.stdout.buffer.write(await store.get(options.table, options.key))
    except NotFoundError:
        raise NotFoundError(f"{options.table} has no key {options.key}") from None
    return ExitCode.OK


async def _value(given: str | None) -> bytes:
    if given is not None:
        return os.fsencode(given)
    value: bytes = await trio.to_thread.run_sync(sys.stdin.buffer.read, _VALUE_MAX_BYTES + 1)
    if len(value) > _VALUE_MAX_BYTES:
        raise NotSupportedError(f"a value has at most {_VALUE_MAX_BYTES} bytes: put a file instead")
    return value
