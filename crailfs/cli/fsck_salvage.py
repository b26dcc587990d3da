"""``crail fsck --salvage`` and ``--discard-unclaimed``: regions whose name space is lost."""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import AsyncExitStack

import trio

from crailfs.cli.exit_codes import ExitCode
from crailfs.cli.operator import address_of, cluster_status, connected
from crailfs.cli.options import target_of
from crailfs.config import ClientConfig
from crailfs.errors import UnavailableError
from crailfs.net.client import RpcClient
from crailfs.records import PlacedRegion
from crailfs.salvage import salvage
from crailfs.salvage.regions import LostRegion
from crailfs.units import format_bytes
from crailfs.wire.messages import ClusterMap

_SHOW_INTERVAL_S = 0.5


def run(options: argparse.Namespace) -> int:
    config = target_of(options).settings.client()
    if options.salvage:
        return trio.run(salvage_files, config, not options.no_verify)
    return trio.run(discard, config)


async def salvage_files(config: ClientConfig, verify: bool) -> int:
    """Returns the exit code; says what was found."""
    async with AsyncExitStack() as open_connections:
        metadata = await open_connections.enter_async_context(connected(config.metadata, config))
        cluster = (await cluster_status(metadata, config)).cluster
        unclaimed = _unclaimed(cluster)
        if not unclaimed:
            return _nothing_to_do()
        servers: dict[bytes, RpcClient] = {}
        for server in cluster.servers:
            if any(placed.server_id == server.id for placed in unclaimed):
                if not server.alive:
                    raise UnavailableError(
                        f"storage server {server.host} does not answer: start it, then salvage"
                    )
                servers[server.id] = await open_connections.enter_async_context(
                    connected(address_of(server), config)
                )
        regions = [LostRegion(placed, servers[placed.server_id]) for placed in unclaimed]
        for region in regions:
            print(
                f"region {region.id}: {region.info.label}, {region.info.held_blocks} blocks of a "
                "lost name space"
            )
        progress = _Progress()
        outcome = await salvage.salvage(
            metadata,
            regions,
            cluster.block_size_bytes,
            verify=verify,
            on_progress=progress.show,
        )
        progress.end()
    for finding in outcome.findings:
        print(finding)
    print(
        f"salvaged into /lost+found: {outcome.file_count} files, "
        f"{format_bytes(outcome.byte_count)} in {outcome.block_count} blocks"
        f"{'' if verify else ', not verified'}; {outcome.superseded_count} older blocks left out"
    )
    if not outcome.is_complete:
        print("the regions keep what they hold: move what is in the way, then salvage again")
    return ExitCode.DAMAGED if outcome.findings else ExitCode.OK


async def discard(config: ClientConfig) -> int:
    """Returns the exit code; says which regions are given free."""
    async with connected(config.metadata, config) as metadata:
        unclaimed = _unclaimed((await cluster_status(metadata, config)).cluster)
        if not unclaimed:
            return _nothing_to_do()
        await salvage.discard(metadata, [placed.id for placed in unclaimed])
    for placed in unclaimed:
        print(f"region {placed.id}: {placed.info.label}: given free")
    return ExitCode.OK


def _unclaimed(cluster: ClusterMap) -> list[PlacedRegion]:
    return [placed for placed in cluster.regions if placed.unclaimed]


def _nothing_to_do() -> int:
    print("no region holds blocks of a lost name space")
    return ExitCode.OK


class _Progress:
    """One line on a terminal, now and then; nothing elsewhere."""

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._shown_at = time.monotonic()

    def show(self, what: str) -> None:
        if self._is_terminal and time.monotonic() - self._shown_at > _SHOW_INTERVAL_S:
            self._shown_at = time.monotonic()
            print(f"\r\x1b[K{what}", end="", file=sys.stderr)

    def end(self) -> None:
        if self._is_terminal:
            print("\r\x1b[K", end="", file=sys.stderr)
