"""Tests against PMem, NVMe and RDMA, in virtual machines or on this host's own devices.

Without a command: everything that tests/lab/plan.toml lists. docs/operations.md, "Hardware lab",
says more.
"""

from __future__ import annotations

import argparse
import secrets
import signal
import sys
from dataclasses import replace
from pathlib import Path

import image
import plan
import power_loss
import real_host
import runs
from tools import Unavailable

RESULTS = image.CHECKOUT / "build/lab"
WHOLE_LIMIT_S = 1200


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/lab", description=__doc__)
    parser.add_argument("--host", type=Path, metavar="FILE", help="devices of this host to use")
    parser.add_argument("--results", type=Path, default=RESULTS, help="a directory")
    parser.set_defaults(seed=secrets.randbits(32))
    commands = parser.add_subparsers(dest="command")
    for name, text in (
        ("run", "run a pytest selection in a guest"),
        ("exec", "run any command in a guest, from the checkout's copy there"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("--guests", type=int, choices=(1, 2), default=1)
        _common(command, name)
        command.add_argument("arguments", nargs="+", metavar="-- ARGUMENTS")
    command = commands.add_parser("power-loss", help="kill a guest under load, again and again")
    command.add_argument("--rounds", type=int, default=10)
    command.add_argument("--lanes", type=int, default=1, help="guests at a time")
    command.add_argument("--seed", type=int, help="of the instants", default=argparse.SUPPRESS)
    command.add_argument("--load", required=True, metavar="COMMAND")
    command.add_argument("--verify", required=True, metavar="COMMAND")
    command.add_argument("--kill-within", type=float, default=5, metavar="SECONDS")
    _common(command, "power-loss")
    command = commands.add_parser("image", help="make the guests' image")
    command.add_argument("--rebuild", action="store_true", help="also where there is one")
    return parser


def _common(command: argparse.ArgumentParser, name: str) -> None:
    command.add_argument("--name", default=name, help="of the results; the same name replaces them")
    command.add_argument("--limit", type=float, default=900, metavar="SECONDS")
    command.add_argument("--fsdax", action="store_true", help="a second NVDIMM on /mnt/pmem")
    command.add_argument("--results", type=Path, default=argparse.SUPPRESS)


def main() -> int:
    # As with an interrupt: what has been started is ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    arguments = _parser().parse_args()
    try:
        return _run(arguments)
    except Unavailable as why:
        line = f"lab: skipped: {why}. Not tested: PMem, NVMe, RDMA between hosts, power loss."
        print(line)
        arguments.results.mkdir(parents=True, exist_ok=True)
        (arguments.results / plan.SUMMARY).write_text(f"{line}\n")
        return 0


def _run(arguments: argparse.Namespace) -> int:
    if arguments.command == "image":
        print(image.ensure(rebuild=arguments.rebuild).directory)
        return 0
    if arguments.command == "power-loss":
        return _power_loss(arguments)
    devices = real_host.environment(arguments.host) if arguments.host else None
    if arguments.command is None:
        return _whole(arguments, devices)
    run = runs.Run(
        name=arguments.name,
        guests=arguments.guests,
        arguments=arguments.arguments,
        limit_s=arguments.limit,
        fsdax=arguments.fsdax,
        plain=arguments.command == "exec",
    )
    if devices is not None:
        return real_host.on_this_host(devices, run, arguments.results)
    return runs.in_guests(image.ensure(), run, arguments.results)


def _power_loss(arguments: argparse.Namespace) -> int:
    if arguments.host:
        raise SystemExit("lab: the power of a real host is not switched off")
    asked = power_loss.PowerLoss(
        name=arguments.name,
        rounds=arguments.rounds,
        load=arguments.load,
        verify=arguments.verify,
        seed=arguments.seed,
        kill_within_s=arguments.kill_within,
        limit_s=arguments.limit,
        fsdax=arguments.fsdax,
    )
    made = image.ensure()
    if arguments.lanes > 1:
        return power_loss.in_lanes(asked, arguments.lanes, arguments.results)
    return power_loss.power_loss(made, asked, arguments.results)


def _whole(arguments: argparse.Namespace, devices: dict[str, str] | None) -> int:
    results = arguments.results
    todo = plan.read(arguments.seed)
    steps: list[plan.Step] = []
    if devices is None:
        made = image.ensure()
    for run in todo.runs:
        if devices is not None and run.guests == 0:
            print(f"lab: {run.name} is left out: it is about virtual machines", flush=True)
            continue

        def step(limit_s: float, run: runs.Run = run) -> int:
            bounded = replace(run, limit_s=limit_s)
            if run.guests == 0:
                return real_host.on_this_host({"CRAIL_LAB": "harness"}, bounded, results)
            if devices is not None:
                return real_host.on_this_host(devices, bounded, results)
            return runs.in_guests(made, bounded, results)

        steps.append(plan.Step(run.name, run.limit_s, step))
    for asked, lanes in todo.power_losses:
        if devices is not None:
            print(f"lab: {asked.name} is left out: a real host keeps its power", flush=True)
            continue

        def cut(limit_s: float, asked: power_loss.PowerLoss = asked, lanes: int = lanes) -> int:
            return power_loss.in_lanes(replace(asked, limit_s=limit_s), lanes, results)

        steps.append(plan.Step(asked.name, asked.limit_s, cut))
    return plan.carry_out(steps, WHOLE_LIMIT_S, results)


if __name__ == "__main__":
    sys.exit(main())
