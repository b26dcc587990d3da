"""``crail status``: servers, tiers, capacity and use, for people or as JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crailfs.cli.exit_codes import ExitCode
from crailfs.cli.options import add_cluster_options, target_of
from crailfs.units import format_bytes

if TYPE_CHECKING:
    from crailfs.config import ClientConfig
    from crailfs.records import PlacedRegion
    from crailfs.target import Target
    from crailfs.wire.messages import RegionUse, Status, StorageStatusReply

EXAMPLES = """\
  crail status
  crail status --at /mnt/crail --json
  crail status --config /etc/crail/crail.toml
"""

_RUNGS = {
    "rdma_flush": "durable by RDMA FLUSH",
    "read_and_request": "durable by RDMA READ and a request",
    "tcp": "durable by the server",
}
"""How what a client writes to persistent memory becomes durable."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    add_cluster_options(parser)


def run(options: argparse.Namespace) -> int:
    import trio

    target = target_of(options)
    config = target.settings.client()
    status, storage = trio.run(_ask, config)
    report = _report(status, storage, config, target)
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        _print(report)
    return ExitCode.OK


async def _ask(config: ClientConfig) -> tuple[Status, dict[bytes, StorageStatusReply | str]]:
    from crailfs.cli.operator import cluster_status, connected, storage_statuses

    async with connected(config.metadata, config) as metadata:
        status = await cluster_status(metadata, config)
    return status, await storage_statuses(status.cluster.servers, config)


def _report(
    status: Status,
    storage: dict[bytes, StorageStatusReply | str],
    config: ClientConfig,
    target: Target,
) -> dict[str, Any]:
    from crailfs.cli.operator import usable_transports

    block_size_bytes = status.cluster.block_size_bytes
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    uses = {use.region_id: use for use in status.regions}
    servers = [
        {
            "id": server.id.hex(),
            "host": server.host,
            "rack": server.rack,
            "alive": server.alive,
            "seconds_since_heard": round(server.seconds_since_heard, 1),
            "tcp": f"{server.tcp_host}:{server.tcp_port}" if server.tcp_port else None,
            "unix": server.unix_path or None,
            "transports": usable_transports(server, config.transports, boot_id),
            "regions": [
                _region(region, uses[region.id])
                for region in status.cluster.regions
                if region.server_id == server.id
            ],
            **_own_words(storage.get(server.id, "not answering")),
        }
        for server in status.cluster.servers
    ]
    tiers = [
        {
            "tier": tier.tier.name.lower(),
            "durable": _all_or_some(
                region.info.durable
                for region in status.cluster.regions
                if region.info.tier is tier.tier
            ),
            "total_bytes": tier.total_blocks * block_size_bytes,
            "used_bytes": (tier.total_blocks - tier.free_blocks) * block_size_bytes,
            "free_bytes": tier.free_blocks * block_size_bytes,
        }
        for tier in status.statistics.tiers
    ]
    return {
        "cluster_id": status.cluster.cluster_id.hex(),
        "metadata": config.metadata,
        "epoch": status.epoch,
        "uptime_seconds": round(status.uptime_seconds, 1),
        "session_count": status.session_count,
        "node_count": status.statistics.node_count,
        "block_size_bytes": block_size_bytes,
        "tiers": tiers,
        "servers": servers,
        "lost_regions": [use.region_id for use in status.regions if use.lost],
        "counters": status.counters,
        "embedded": _embedded(target),
    }


def _region(region: PlacedRegion, use: RegionUse) -> dict[str, Any]:
    info = region.info
    free_blocks = use.free_blocks + use.returning_blocks
    return {
        "id": region.id,
        "tier": info.tier.name.lower(),
        "medium": info.medium,
        "durable": info.durable,
        "size_bytes": info.block_count * info.block_size_bytes,
        "used_bytes": (info.block_count - use.failed_blocks - free_blocks) * info.block_size_bytes,
        "free_bytes": free_blocks * info.block_size_bytes,
        "returning_bytes": use.returning_blocks * info.block_size_bytes,
        "failed_blocks": use.failed_blocks,
        "label": info.label,
        "unclaimed_blocks": info.held_blocks if region.unclaimed else 0,
    }


def _own_words(answer: StorageStatusReply | str) -> dict[str, Any]:
    """What a storage server says of itself."""
    if isinstance(answer, str):
        return {"problem": answer, "clients": [], "counters": {}}
    clients = [
        {
            "id": f"{client.client_id:016x}",
            "peer": client.peer,
            "transport": client.transport,
            "rung": client.rung.name.lower() if client.transport != "local" else None,
        }
        for client in answer.clients
    ]
    return {"problem": None, "clients": clients, "counters": answer.counters}


def _all_or_some(values: Iterable[bool]) -> str:
    found = set(values)
    if found == {True}:
        return "yes"
    return "in part" if True in found else "no"


def _embedded(target: Target) -> dict[str, Any] | None:
    running = target.state.read_running() if target.state is not None else None
    if target.state is None or running is None:
        return None
    return {
        "mountpoint": running.mountpoint,
        "state": str(target.state.directory),
        "supervisor_pid": running.supervisor.pid,
        "processes": {
            name: {
                "pid": process.identity.pid if process.identity is not None else None,
                "ready": list(process.ready),
                "restart_count": process.restart_count,
            }
            for name, process in running.processes.items()
        },
    }


def _print(report: dict[str, Any]) -> None:
    embedded = report["embedded"]
    if embedded is not None:
        print(f"mounted at {embedded['mountpoint']}, state in {embedded['state']}")
        for name, process in embedded["processes"].items():
            restarts = process["restart_count"]
            print(
                f"  {name:<9}pid {process['pid'] or 'none: it is started again'}"
                + (f", restarted {restarts} times" if restarts else "")
            )
    print(
        f"cluster {report['cluster_id']}\n"
        f"metadata server {report['metadata']}: up {report['uptime_seconds']:.0f} s, "
        f"{report['session_count']} clients, {report['node_count']} nodes, blocks of "
        f"{format_bytes(report['block_size_bytes'])}"
    )
    print(f"{'tier':<8}{'size':>10}{'used':>10}{'free':>10}{'use':>6}  durable")
    for tier in report["tiers"]:
        share = tier["used_bytes"] / tier["total_bytes"] if tier["total_bytes"] else 0.0
        sizes = [tier["total_bytes"], tier["used_bytes"], tier["free_bytes"]]
        print(f"{tier['tier']:<8}" + "".join(f"{format_bytes(size):>10}" for size in sizes), end="")
        print(f"{share:>6.0%}  {tier['durable']}")
    for server in report["servers"]:
        _print_server(server)
    for region_id in report["lost_regions"]:
        print(f"region {region_id} is LOST: its server came back without it")
    waiting = report["counters"].get("header_changes_waiting", 0)
    if waiting:
        print(f"{waiting} changes that block headers have yet to follow")


def _print_server(server: dict[str, Any]) -> None:
    state = "alive" if server["alive"] else "NOT ANSWERING"
    heard = f", last heard of {server['seconds_since_heard']} s ago"
    rack = f" in rack {server['rack']}" if server["rack"] else ""
    ways = ", ".join(server["transports"]) or "none from this host"
    print(
        f"storage server {server['host']}{rack}: {state}"
        f"{'' if server['alive'] else heard}; transports: {ways}"
    )
    for region in server["regions"]:
        _print_region(region)
    counters = server["counters"]
    down, up = counters.get("demoted_bytes", 0), counters.get("promoted_bytes", 0)
    if down or up:
        print(
            f"  moved to slower tiers: {format_bytes(down)}, to faster ones: {format_bytes(up)}, "
            f"changed meanwhile: {counters.get('move_conflicts', 0)} extents"
        )
    for client in server["clients"]:
        rung = f", {_RUNGS[client['rung']]}" if client["rung"] else ""
        print(f"  client {client['id']} ({client['peer']}): {client['transport']}{rung}")
    if server["alive"] and server["problem"]:
        print(f"  it does not say who its clients are: {server['problem']}")


def _print_region(region: dict[str, Any]) -> None:
    medium = region["medium"] or "unknown medium"
    # The medium of a stand-in says itself that it is not durable.
    durable = "" if "durable" in medium else (", durable" if region["durable"] else ", not durable")
    print(
        f"  region {region['id']}: {region['tier']}, {medium}{durable}, "
        f"{format_bytes(region['used_bytes'])} of {format_bytes(region['size_bytes'])} used, "
        f"{region['label']}"
    )
    if region["failed_blocks"]:
        print(f"    {region['failed_blocks']} blocks have failed and are not used any more")
    if region["unclaimed_blocks"]:
        print(
            f"    holds {region['unclaimed_blocks']} blocks of a lost name space, nothing is "
            "written there: run `crail fsck --salvage`"
        )
