"""``crail down``: unmount an embedded file system and stop its processes."""

from __future__ import annotations

import argparse
from pathlib import Path

from crailfs.cli.exit_codes import ExitCode
from crailfs.embedded import registry
from crailfs.embedded.mountpoint import clean_dead_mount, unmount
from crailfs.embedded.process_identity import ProcessIdentity, stop_process, wait_ended
from crailfs.embedded.state import State
from crailfs.embedded.supervisor import stop_leftovers
from crailfs.errors import BusyError, UnavailableError
from fuse_client.mountpoints import find_mount

EXAMPLES = """\
  crail down /mnt/crail              the data stays, `crail up /mnt/crail` finds it again
  crail down /mnt/crail --force      also while programs use it: they get errors
  crail down /mnt/crail --destroy    and remove all that it holds
"""

_MOUNT_END_TIMEOUT_S = 50.0
_SUPERVISOR_STOP_TIMEOUT_S = 90.0
"""A little more than all its children's own deadlines together."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("mountpoint", metavar="MOUNTPOINT")
    parser.add_argument("--force", action="store_true", help="unmount even while it is in use")
    parser.add_argument(
        "--destroy",
        action="store_true",
        help="remove the state directory and the memory region: everything stored there is gone",
    )
    parser.add_argument(
        "--state",
        metavar="DIR",
        help="its state directory (default: the one last used for MOUNTPOINT)",
    )


def run(options: argparse.Namespace) -> int:
    mountpoint = registry.absolute(Path(options.mountpoint))
    state = State(Path(options.state)) if options.state else registry.state_of(mountpoint)
    if state is None or not state.exists:
        if clean_dead_mount(mountpoint):
            print(f"{mountpoint}: a dead mount was taken away")
            return ExitCode.OK
        raise UnavailableError(
            f"no embedded file system was ever up at {mountpoint}, or its state is gone: name its "
            "state directory with --state"
        )
    was_running = _stop(state, mountpoint, force=options.force)
    if options.destroy:
        state.destroy()
        registry.forget(mountpoint)
        print(f"{mountpoint} is down, and {state.directory} is removed")
        return ExitCode.OK
    if not was_running:
        raise UnavailableError(
            f"no embedded file system runs at {mountpoint}: its data is in {state.directory}"
        )
    print(f"{mountpoint} is down; its data stays in {state.directory}")
    return ExitCode.OK


def _stop(state: State, mountpoint: Path, *, force: bool) -> bool:
    """Whether anything was running."""
    running = state.read_running()
    if running is not None and Path(running.mountpoint) != mountpoint:
        raise BusyError(
            f"{state.directory} is up at {running.mountpoint}, not at {mountpoint}: "
            f"`crail down {running.mountpoint}`"
        )
    pid = state.locked_by()
    supervisor = ProcessIdentity.of(pid) if pid is not None else None
    if supervisor is None:
        # Nobody restarts anything now: what was left is ended here.
        found = running is not None or find_mount(mountpoint) is not None
        state.lock()
        if find_mount(mountpoint) is not None:
            unmount(mountpoint, force=force)
        stop_leftovers(state)
        return found
    if find_mount(mountpoint) is not None:
        unmount(mountpoint, force=force)
        mount = running.processes.get("mount") if running is not None else None
        if mount is not None and mount.identity is not None:
            # It commits what is open and ends by itself; being told to stop would not hasten it.
            wait_ended(mount.identity, _MOUNT_END_TIMEOUT_S if not force else 0.0)
    stop_process(supervisor, timeout_s=_SUPERVISOR_STOP_TIMEOUT_S, what="supervisor")
    if state.read_running() is not None:
        state.lock()
        stop_leftovers(state)
    return True
