"""``crail fs df``"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from crailfs.cli.exit_codes import ExitCode
from crailfs.units import format_bytes

if TYPE_CHECKING:
    from crailfs.client.store import CrailStore


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON list, in bytes")


async def run(store: CrailStore, options: argparse.Namespace) -> int:
    statistics = await store.statistics()
    rows: list[tuple[str, int, int, int]] = []
    for tier in statistics.tiers:
        total_bytes = tier.total_blocks * statistics.block_size_bytes
        free_bytes = tier.free_blocks * statistics.block_size_bytes
        rows.append((tier.tier.name.lower(), total_bytes, total_bytes - free_bytes, free_bytes))
    if options.json:
        keys = ("tier", "total_bytes", "used_bytes", "free_bytes")
        print(json.dumps([dict(zip(keys, row, strict=True)) for row in rows], indent=2))
        return ExitCode.OK
    rows.append(
        (
            "all",
            sum(row[1] for row in rows),
            sum(row[2] for row in rows),
            sum(row[3] for row in rows),
        )
    )
    print(f"{'tier':<8}{'size':>10}{'used':>10}{'free':>10}{'use':>6}")
    for name, *sizes in rows:
        shown = "".join(f"{format_bytes(size):>10}" for size in sizes)
        print(f"{name:<8}{shown}{sizes[1] / max(1, sizes[0]):>6.0%}")
    return ExitCode.OK
