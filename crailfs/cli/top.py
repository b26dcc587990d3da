"""``crail top``: counters of the servers, live."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from crailfs.cli.exit_codes import ExitCode
from crailfs.cli.options import add_cluster_options, target_of
from crailfs.units import format_bytes

if TYPE_CHECKING:
    from crailfs.config import ClientConfig
    from crailfs.wire.messages import Status

EXAMPLES = """\
  crail top
  crail top --interval 0.5
  crail top --rounds 3 | cat      three times, one below the other
"""

_CLEAR = "\x1b[H\x1b[2J"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--interval", metavar="SECONDS", type=_seconds, default=2.0, help="default: 2"
    )
    parser.add_argument(
        "--rounds", metavar="N", type=int, default=0, help="stop after N (default: on Ctrl-C)"
    )
    add_cluster_options(parser)


def run(options: argparse.Namespace) -> int:
    import trio

    config = target_of(options).settings.client()
    try:
        trio.run(_watch, config, options.interval, options.rounds)
    except* KeyboardInterrupt:
        pass
    return ExitCode.OK


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= 3600:
        raise argparse.ArgumentTypeError(f"expected seconds from 0.1 to 3600, found {text!r}")
    return seconds


async def _watch(config: ClientConfig, interval_s: float, rounds: int) -> None:
    import trio

    from crailfs.cli.operator import cluster_status, connected, storage_statuses

    before: dict[str, dict[str, int]] = {}
    before_s = 0.0
    done = 0
    async with connected(config.metadata, config) as metadata:
        while True:
            status = await cluster_status(metadata, config)
            now_s = trio.current_time()
            counters = {"metadata server": status.counters}
            problems = []
            of_storage = await storage_statuses(status.cluster.servers, config)
            for server in status.cluster.servers:
                name = f"storage server {server.host} {server.id.hex()[:8]}"
                answer = of_storage.get(server.id, "not answering")
                if isinstance(answer, str):
                    problems.append(f"{name}: {answer}")
                else:
                    counters[name] = answer.counters
            lines = [*_summary(status), *_rates(counters, before, now_s - before_s), *problems]
            print((_CLEAR if sys.stdout.isatty() else "") + "\n".join(lines), flush=True)
            before, before_s = counters, now_s
            done += 1
            if done == rounds:
                return
            await trio.sleep(interval_s)


def _summary(status: Status) -> list[str]:
    block_size_bytes = status.cluster.block_size_bytes
    use = ", ".join(
        f"{tier.tier.name.lower()} "
        f"{format_bytes((tier.total_blocks - tier.free_blocks) * block_size_bytes)} of "
        f"{format_bytes(tier.total_blocks * block_size_bytes)}"
        for tier in status.statistics.tiers
    )
    return [
        f"{status.statistics.node_count} nodes, {status.session_count} clients, up "
        f"{status.uptime_seconds:.0f} s",
        f"used: {use}",
    ]


def _rates(
    now: dict[str, dict[str, int]], before: dict[str, dict[str, int]], elapsed_s: float
) -> list[str]:
    """Each counter and, from the second round on, how much it grows in a second."""
    lines = []
    for server, counters in now.items():
        lines.append(f"\n{server:<42}{'total':>16}{'per second':>14}")
        for name, value in sorted(counters.items()):
            earlier: Any = before.get(server, {}).get(name)
            rate = f"{(value - earlier) / elapsed_s:>14.1f}" if earlier is not None else ""
            lines.append(f"  {name:<40}{value:>16}{rate}")
    return lines
