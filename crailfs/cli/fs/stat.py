"""``crail fs stat``"""

from __future__ import annotations

import argparse
import json
import stat
from collections import Counter
from typing import TYPE_CHECKING, Any

from crailfs.cli.exit_codes import ExitCode
from crailfs.cli.fs.listing import printable
from crailfs.cli.fs.paths import about

if TYPE_CHECKING:
    from crailfs.client.store import CrailStore
    from crailfs.records import Attributes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")


async def _places(store: CrailStore, node: Attributes) -> list[dict[str, Any]]:
    """How much of a file's data each region holds, fastest tier first."""
    from crailfs.records import DATA_KINDS

    if node.kind not in DATA_KINDS:
        return []
    filesystem = store.filesystem
    blocks: Counter[int] = Counter()
    stored: Counter[int] = Counter()
    for extent in await filesystem.extents(node.ino):
        full_bytes = (extent.block_count - 1) * filesystem.block_size_bytes
        for place in extent.replicas:
            blocks[place.region] += extent.block_count
            stored[place.region] += full_bytes + extent.tail_visible_bytes
    cluster = await filesystem.cluster_map()
    hosts = {server.id: server.host for server in cluster.servers}
    return [
        {
            "tier": region.info.tier.name.lower(),
            "region": region.id,
            "host": hosts.get(region.server_id, "unknown"),
            "medium": region.info.medium,
            "durable": region.info.durable,
            "bytes": stored[region.id],
            "blocks": blocks[region.id],
        }
        for region in sorted(cluster.regions, key=lambda region: (region.info.tier, region.id))
        if blocks[region.id]
    ]


def _by_tier(places: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    tiers: dict[str, dict[str, int]] = {}
    for place in places:
        tier = tiers.setdefault(place["tier"], {"bytes": 0, "blocks": 0})
        tier["bytes"] += place["bytes"]
        tier["blocks"] += place["blocks"]
    return tiers


def _print_places(tiers: dict[str, dict[str, int]], places: list[dict[str, Any]]) -> None:
    for name, tier in tiers.items():
        print(f"{'on ' + name:<16} {tier['bytes']} bytes in {tier['blocks']} blocks")
        for place in places:
            if place["tier"] == name:
                print(
                    f"{'':<16}   region {place['region']} of {place['host']} "
                    f"({place['medium'] or 'unknown medium'}): {place['bytes']} bytes in "
                    f"{place['blocks']} blocks"
                )


async def run(store: CrailStore, options: argparse.Namespace) -> int:
    with about(options.path):
        node = await store.lookup(options.path, follow=False)
        places = await _places(store, node)
    placement = node.placement
    shown: dict[str, Any] = {
        "path": options.path,
        "inode": node.ino,
        "kind": node.kind.name.lower(),
        "mode": stat.filemode(node.st_mode),
        "uid": node.uid,
        "gid": node.gid,
        "links": node.nlink,
        "size": node.size,
        "allocated_bytes": node.block_count * store.filesystem.block_size_bytes,
        "mtime_ns": node.mtime_ns,
        "ctime_ns": node.ctime_ns,
        "atime_ns": node.atime_ns,
        "birth_ns": node.btime_ns,
        "storage_class": str(placement.storage_class),
        "location": placement.location,
        "durability": placement.durability.name.lower(),
        "allocation_bytes": placement.allocation_blocks * store.filesystem.block_size_bytes,
        "replicas": placement.replicas,
        "pinned": placement.pinned,
        "ttl_seconds": placement.ttl_s,
        "tiers": _by_tier(places),
        "places": places,
        "target": printable(node.target),
    }
    if options.json:
        print(json.dumps(shown, indent=2))
    else:
        for name, value in shown.items():
            if name == "tiers":
                _print_places(value, places)
            elif value != "" and name != "places":
                print(f"{name:<16} {value}")
    return ExitCode.OK
