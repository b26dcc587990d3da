"""``crail fs kv``: values of a table, each replaced as a whole."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

import trio

from crailfs.cli.exit_codes import ExitCode
from crailfs.cli.fs.listing import printable
from crailfs.cli.fs.paths import find
from crailfs.cli.fs.permissions import creation_mode
from crailfs.errors import ConfigurationError, NotFoundError, NotSupportedError
from crailfs.records import NodeKind
from crailfs.units import MIB

if TYPE_CHECKING:
    from crailfs.client.filesystem import FileSystem

_PIECE_BYTES = 4 * MIB
_VALUE_MAX_BYTES = 64 * MIB
"""A value is held in memory as a whole."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("put", "get", "ls", "rm"))
    parser.add_argument("table", metavar="TABLE", help="made by `crail fs mkdir --kind table`")
    parser.add_argument("key", metavar="KEY", nargs="?", help="not for ls")
    parser.add_argument(
        "value", metavar="VALUE", nargs="?", help="for put (default: standard input)"
    )


async def run(file_system: FileSystem, options: argparse.Namespace) -> int:
    table = await find(file_system, options.table)
    if table.kind is not NodeKind.TABLE:
        raise NotSupportedError(
            f"{options.table} is no table: make one with `crail fs mkdir --kind table`"
        )
    if options.action == "ls":
        await _list(file_system, table.ino)
        return ExitCode.OK
    if options.key is None:
        raise ConfigurationError(f"kv {options.action}: a KEY is missing")
    key = os.fsencode(options.key)
    if options.action == "put":
        await _put(file_system, table.ino, key, options.value)
        return ExitCode.OK
    try:
        if options.action == "rm":
            await file_system.remove(table.ino, key, directory=False)
        else:
            await _get(file_system, table.ino, key)
    except NotFoundError:
        raise NotFoundError(f"{options.table} has no key {options.key}") from None
    return ExitCode.OK


async def _put(file_system: FileSystem, table: int, key: bytes, given: str | None) -> None:
    if given is None:
        value = await trio.to_thread.run_sync(sys.stdin.buffer.read, _VALUE_MAX_BYTES + 1)
    else:
        value = os.fsencode(given)
    if len(value) > _VALUE_MAX_BYTES:
        raise NotSupportedError(f"a value has at most {_VALUE_MAX_BYTES} bytes: put a file instead")
    await file_system.put_key_value(
        table, key, value, mode=creation_mode(0o666), uid=os.geteuid(), gid=os.getegid()
    )


async def _get(file_system: FileSystem, table: int, key: bytes) -> None:
    file = await file_system.open((await file_system.lookup(table, key)).ino)
    try:
        offset = 0
        while piece := await file.read(offset, _PIECE_BYTES):
            offset += len(piece)
            sys.stdout.buffer.write(piece)
    finally:
        await file.close()


async def _list(file_system: FileSystem, table: int) -> None:
    after_name = b""
    while True:
        page = await file_system.read_directory(table, after_name)
        for entry in page.entries:
            print(f"{entry.attributes.size:>12} {printable(entry.name)}")
        if page.complete:
            return
        after_name = page.entries[-1].name
