"""``crail fsck``: the metadata server's audit, with ``--data`` every stored byte; and what can be
done when the metadata server's state is lost."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from crailfs.cli.exit_codes import ExitCode
from crailfs.cli.options import add_cluster_options, target_of
from crailfs.errors import ConfigurationError
from crailfs.units import format_bytes

if TYPE_CHECKING:
    from crailfs.client.filesystem import FileSystem
    from crailfs.config import ClientConfig, MetadataConfig
    from crailfs.net.client import RpcClient
    from crailfs.wire.messages import AuditReply

EXAMPLES = """\
  crail fsck                                the running file system, without stopping it
  crail fsck --data                         and read every block and check its checksum
  crail fsck --state /var/lib/crailfs/mnt-crail     one that is down
  crail fsck --salvage                      the metadata server's state is lost, and a new one is
                                            running: files from the regions into /lost+found
exit codes: 0 nothing found, 6 damage found, 3 not reachable, 4 --state of one that is up
"""

_AUDIT_TIMEOUT_MS = 600_000
_READ_BYTES = 4 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        action="store_true",
        help="also read every block of every file and check it against its checksum",
    )
    parser.add_argument(
        "--state",
        metavar="DIR",
        help="check one that is down: the state directory of `crail up` or of a metadata server",
    )
    parser.add_argument(
        "--salvage",
        action="store_true",
        help="put the files of a lost name space, as far as persistent memory and NVMe regions "
        "hold them, into /lost+found of the new one; can be repeated",
    )
    parser.add_argument(
        "--no-verify",
        action="store_true",
        help="with --salvage: do not read every block and check it against its checksum",
    )
    parser.add_argument(
        "--discard-unclaimed",
        action="store_true",
        help="give up what regions hold of a lost name space, so that they can be used again",
    )
    parser.add_argument(
        "--yes-lose-the-data",
        action="store_true",
        help="needed with --discard-unclaimed, which cannot be taken back",
    )
    add_cluster_options(parser)


def run(options: argparse.Namespace) -> int:
    _check(options)
    if options.salvage or options.discard_unclaimed:
        from crailfs.cli import fsck_salvage

        return fsck_salvage.run(options)
    if options.state is not None:
        if options.data:
            raise ConfigurationError(
                "--data reads through the servers: leave --state out, or start "
                "the file system first"
            )
        audit = _audit_offline(_offline_config(Path(options.state)))
        return _conclude(list(audit.findings), audit)
    import trio

    return trio.run(_check_online, target_of(options).settings.client(), options.data)


def _check(options: argparse.Namespace) -> None:
    """Raise ConfigurationError for options that do not go together."""
    others = options.data or options.state is not None
    if options.salvage and (others or options.discard_unclaimed):
        raise ConfigurationError(
            "--salvage goes without --data, --state and --discard-unclaimed: it works on a running "
            "cluster and verifies what it finds"
        )
    if options.no_verify and not options.salvage:
        raise ConfigurationError("--no-verify goes with --salvage")
    if options.discard_unclaimed and others:
        raise ConfigurationError("--discard-unclaimed goes without --data and --state")
    if options.discard_unclaimed != options.yes_lose_the_data:
        raise ConfigurationError(
            "--discard-unclaimed gives up all files of the lost name space, which --salvage could "
            "bring back: confirm it with --yes-lose-the-data"
        )


def _offline_config(directory: Path) -> MetadataConfig:
    from crailfs.config import Credentials, MetadataConfig
    from crailfs.embedded.state import State

    state = State(directory)
    if state.exists:
        return state.settings().metadata()
    if not directory.is_dir():
        raise ConfigurationError(f"--state {directory}: no such directory")
    # Offline nobody connects: neither address nor secret is used.
    nobody = Credentials(cluster_id=b"", secret=b"")
    return MetadataConfig(state=directory, listen=(), credentials=nobody)


def _audit_offline(config: MetadataConfig) -> AuditReply:
    from metadata_server.driver import Driver

    if not config.state.is_dir() or not any(config.state.iterdir()):
        raise ConfigurationError(f"{config.state}: holds no name space")
    driver = Driver.open(config)
    try:
        return driver.audit()
    finally:
        driver.close()


async def _check_online(config: ClientConfig, data: bool) -> int:
    from crailfs.cli.operator import cluster_status, connected
    from crailfs.wire.messages import Audit, AuditReply, Opcode

    async with connected(config.metadata, config) as metadata:
        # An audit may take long; that nobody is there is to be known at once.
        await cluster_status(metadata, config)
        audit = await metadata.call(Opcode.AUDIT, Audit(), deadline_ms=_AUDIT_TIMEOUT_MS)
    assert isinstance(audit, AuditReply)
    findings = list(audit.findings)
    if data:
        findings += await _check_data(config)
    return _conclude(findings, audit)


async def _check_data(config: ClientConfig) -> list[str]:
    """Read every block that a file has; what could not be read as it was written."""
    from crailfs.cli.fs.listing import printable
    from crailfs.cli.operator import connected
    from crailfs.cli.walk import walk
    from crailfs.client.filesystem import FileSystem
    from crailfs.errors import CrailError, NotFoundError, StaleError
    from crailfs.records import DATA_KINDS

    findings = []
    file_count, byte_count, shown_at = 0, 0, time.monotonic()
    async with (
        FileSystem.connect(config) as file_system,
        connected(config.metadata, config) as metadata,
    ):
        async for path, attributes in walk(file_system):
            if attributes.kind not in DATA_KINDS:
                continue
            try:
                byte_count += await _read_file(file_system, metadata, attributes.ino)
            except (NotFoundError, StaleError):
                continue  # removed while we looked
            except CrailError as error:
                findings.append(f"{printable(path)}: {error.message}")
            file_count += 1
            if sys.stderr.isatty() and time.monotonic() - shown_at > 0.5:
                shown_at = time.monotonic()
                print(
                    f"\r{file_count} files, {format_bytes(byte_count)} read",
                    end="",
                    file=sys.stderr,
                )
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr)
    print(f"data: {file_count} files, {format_bytes(byte_count)} read and verified")
    return findings


async def _read_file(file_system: FileSystem, metadata: RpcClient, ino: int) -> int:
    """Read what the file's extents cover, not its holes; the number of bytes.

    Raises what reading raises: ``ChecksumError``, ``BlockLostError``, ``UnavailableError``.
    """
    from crailfs.units import blocks_for
    from crailfs.wire.messages import ExtentPage, GetExtents, Opcode

    block_size_bytes = file_system.block_size_bytes
    file = await file_system.open(ino)
    try:
        size_bytes = file.attributes.size
        next_block, end_block = 0, blocks_for(size_bytes, block_size_bytes)
        byte_count = 0
        while next_block < end_block:
            page = await metadata.call(
                Opcode.GET_EXTENTS, GetExtents(ino, next_block, end_block - next_block)
            )
            assert isinstance(page, ExtentPage)
            for extent in page.extents:
                start = extent.file_block * block_size_bytes
                end = min(size_bytes, start + extent.block_count * block_size_bytes)
                for offset in range(start, end, _READ_BYTES):
                    byte_count += len(await file.read(offset, min(_READ_BYTES, end - offset)))
            if page.next_block <= next_block:
                break
            next_block = page.next_block
        return byte_count
    finally:
        await file.close()


def _conclude(findings: list[str], audit: AuditReply) -> int:
    for finding in findings:
        print(finding)
    counts = ", ".join(f"{name} {count}" for name, count in sorted(audit.counts.items()))
    print(f"name space: {counts}")
    print(f"{len(findings)} findings" if findings else "nothing found: all invariants hold")
    return ExitCode.DAMAGED if findings else ExitCode.OK
