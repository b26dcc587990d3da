"""``crail status``: servers, tiers, capacity and use, for people or as JSON."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crailfs.cli.exit_codes import ExitCode
from crailfs.cli.options import add_cluster_options, target_of
from crailfs.units import format_bytes

if TYPE_CHECKING:
    from crailfs.config import ClientConfig
    from crailfs.target import Target
    from crailfs.wire.messages import Status

EXAMPLES = """\
  crail status
  crail status --at /mnt/crail --json
  crail status --config /etc/crail/crail.toml
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    add_cluster_options(parser)


def run(options: argparse.Namespace) -> int:
    import trio

    target = target_of(options)
    config = target.settings.client()
    status = trio.run(_ask, config)
    report = _report(status, config, target)
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        _print(report)
    return ExitCode.OK


async def _ask(config: ClientConfig) -> Status:
    from crailfs.cli.operator import cluster_status, connected

    async with connected(config.metadata, config) as metadata:
        return await cluster_status(metadata, config)


def _report(status: Status, config: ClientConfig, target: Target) -> dict[str, Any]:
    from crailfs.cli.operator import usable_transports

    block_size_bytes = status.cluster.block_size_bytes
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
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
                {
                    "id": region.id,
                    "tier": region.info.tier.name.lower(),
                    "size_bytes": region.info.block_count * region.info.block_size_bytes,
                    "durable": region.info.durable,
                    "label": region.info.label,
                    "unclaimed_blocks": region.info.held_blocks if region.unclaimed else 0,
                }
                for region in status.cluster.regions
                if region.server_id == server.id
            ],
        }
        for server in status.cluster.servers
    ]
    tiers = [
        {
            "tier": tier.tier.name.lower(),
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
        "counters": status.counters,
        "embedded": _embedded(target),
    }


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
    print(f"{'tier':<8}{'size':>10}{'used':>10}{'free':>10}{'use':>6}")
    for tier in report["tiers"]:
        share = tier["used_bytes"] / tier["total_bytes"] if tier["total_bytes"] else 0.0
        sizes = [tier["total_bytes"], tier["used_bytes"], tier["free_bytes"]]
        print(f"{tier['tier']:<8}" + "".join(f"{format_bytes(size):>10}" for size in sizes), end="")
        print(f"{share:>6.0%}")
    for server in report["servers"]:
        state = "alive" if server["alive"] else "NOT ANSWERING"
        heard = f", last heard of {server['seconds_since_heard']} s ago"
        rack = f" in rack {server['rack']}" if server["rack"] else ""
        ways = ", ".join(server["transports"]) or "none from this host"
        print(
            f"storage server {server['host']}{rack}: {state}"
            f"{'' if server['alive'] else heard}; transports: {ways}"
        )
        for region in server["regions"]:
            durable = "durable" if region["durable"] else "lost with the host's power"
            print(
                f"  region {region['id']}: {region['tier']}, {format_bytes(region['size_bytes'])}, "
                f"{durable}, {region['label']}"
            )
            if region["unclaimed_blocks"]:
                print(
                    f"    holds {region['unclaimed_blocks']} blocks of a lost name space, nothing "
                    "is written there: run `crail fsck --salvage`"
                )
    waiting = report["counters"].get("header_changes_waiting", 0)
    if waiting:
        print(f"{waiting} changes that block headers have yet to follow")
