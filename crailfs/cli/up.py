"""``crail up``: a metadata server, a storage server and a mount on this host, with one command."""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from crailfs import config_values
from crailfs.cli.exit_codes import ExitCode, ReportedError
from crailfs.embedded import registry
from crailfs.embedded.logs import open_log
from crailfs.embedded.mountpoint import prepare_mountpoint
from crailfs.embedded.sizes import Machine, Sizes, choose_sizes
from crailfs.embedded.state import State
from crailfs.embedded.supervisor import START_TIMEOUT_S, child_environment
from crailfs.errors import BusyError, ConfigurationError, CrailError
from crailfs.records import Tier
from crailfs.units import format_bytes

EXAMPLES = """\
  crail up /mnt/crail                           sizes derived from the machine
  crail up /mnt/crail --memory 8GiB --disk 100GiB
  crail up ~/scratch --state /nvme/crail --disk 0
  crail down /mnt/crail                         stop it; the same `crail up` finds the data again
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("mountpoint", metavar="MOUNTPOINT", help="an existing, empty directory")
    parser.add_argument(
        "--state",
        metavar="DIR",
        help="where data and metadata are kept (default: the one last used for MOUNTPOINT, else "
        "one of its own below /var/lib/crailfs or ~/.local/state/crailfs)",
    )
    parser.add_argument(
        "--memory",
        metavar="SIZE",
        type=_size,
        help="size of the memory tier, 0 for none (default: a quarter of the available memory, at "
        "most half of what is free in /dev/shm)",
    )
    parser.add_argument(
        "--disk",
        metavar="SIZE",
        type=_size,
        help="size of the disk tier, 0 for none (default: a quarter of what is free where the "
        "state is kept, less a reserve of 5 %% of that file system)",
    )
    parser.add_argument(
        "--nonempty", action="store_true", help="mount over a directory that is not empty"
    )


def run(options: argparse.Namespace) -> int:
    started_at = time.monotonic()
    mountpoint = registry.absolute(Path(options.mountpoint))
    state = State(Path(options.state)) if options.state else registry.default_state(mountpoint)
    # A supervisor that was killed may have left its mount, which nobody restarts any more: that is
    # found and taken down by the next one, under the state's lock.
    if not _has_leftovers(state):
        prepare_mountpoint(mountpoint, allow_nonempty=options.nonempty)
    if state.locked_by() is not None:
        raise BusyError(
            f"the state directory {state.directory} is in use by pid {state.locked_by()}: stop it "
            "with `crail down`, or name another with --state"
        )
    lines = _prepare_state(state, options.memory, options.disk)
    registry.remember(mountpoint, state)
    _start_supervisor(state, mountpoint, allow_nonempty=options.nonempty)
    print(f"{mountpoint} is up after {time.monotonic() - started_at:.1f} s")
    for line in lines:
        print(f"  {line}")
    print(f"  state   {state.directory}")
    print(f"  stop    crail down {options.mountpoint}")
    return ExitCode.OK


def _size(text: str) -> int:
    try:
        return int(config_values.size(text, Path()))
    except ValueError as expected:
        raise argparse.ArgumentTypeError(f"expected {expected}, found {text!r}") from expected


def _has_leftovers(state: State) -> bool:
    return state.locked_by() is None and state.read_running() is not None


def _prepare_state(state: State, memory_bytes: int | None, disk_bytes: int | None) -> list[str]:
    """Make the state if it is new; what its tiers are, for people."""
    if state.exists:
        regions = state.regions()
        asked = {Tier.MEMORY: ("--memory", memory_bytes), Tier.DISK: ("--disk", disk_bytes)}
        for tier, (option, asked_bytes) in asked.items():
            _, has_bytes = regions.get(tier, (None, 0))
            if asked_bytes is not None and asked_bytes != has_bytes:
                raise ConfigurationError(
                    f"{option} {format_bytes(asked_bytes)}: {state.directory} was made with "
                    f"{format_bytes(has_bytes)}, which cannot be changed: leave the option out, or "
                    "make a new file system after `crail down MOUNTPOINT --destroy`"
                )
        lines = []
        for tier, (path, size_bytes) in regions.items():
            gone = "" if path.exists() else ": gone (a restart of the host?), what it held is lost"
            lines.append(f"{tier.name.lower():<8}{format_bytes(size_bytes):<10}{path}{gone}")
        return lines
    sizes: Sizes = choose_sizes(Machine.here(state.directory), memory_bytes, disk_bytes)
    state.create(sizes)
    return [
        f"memory  {format_bytes(sizes.memory_bytes):<10}{sizes.memory_reason}",
        f"disk    {format_bytes(sizes.disk_bytes):<10}{sizes.disk_reason}",
    ]


def _start_supervisor(state: State, mountpoint: Path, *, allow_nonempty: bool) -> None:
    """Returns when the mount is usable; raises what the supervisor reports."""
    state.log_directory.mkdir(mode=0o700, exist_ok=True)
    reading, writing = os.pipe()
    log_fd = open_log(state.log_directory / "supervisor.log")
    try:
        supervisor = subprocess.Popen(
            [
                sys.executable, "-m", "crailfs.embedded.supervisor",
                str(state.directory), str(mountpoint), str(writing),
                "nonempty" if allow_nonempty else "empty",
            ],
            stdin=subprocess.DEVNULL,
            stdout=log_fd,
            stderr=log_fd,
            pass_fds=(writing,),
            start_new_session=True,
            cwd="/",
            env=child_environment(),
        )  # fmt: skip
    finally:
        os.close(writing)
        os.close(log_fd)
    try:
        report = _read_report(reading, state)
    except BaseException:
        # Interrupted, or it says nothing: nothing half started stays behind.
        supervisor.send_signal(signal.SIGTERM)
        supervisor.wait()
        raise
    finally:
        os.close(reading)
    if "error" in report:
        supervisor.wait()
        raise ReportedError(str(report["error"]), report["exit_code"])


def _read_report(reading: int, state: State) -> dict[str, Any]:
    # The supervisor gives up by itself before this.
    deadline = time.monotonic() + 2 * START_TIMEOUT_S
    line = b""
    while not line.endswith(b"\n"):
        readable, _, _ = select.select([reading], [], [], max(0.0, deadline - time.monotonic()))
        piece = os.read(reading, 65536) if readable else b""
        if not piece:
            raise CrailError(
                f"the supervisor has {'ended' if readable else 'not become ready'}: see "
                f"{state.log_directory}/supervisor.log"
            )
        line += piece
    report: dict[str, Any] = json.loads(line)
    return report
