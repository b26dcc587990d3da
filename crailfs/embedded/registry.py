"""Which state directory belongs to which mount point: one symbolic link each, so that ``crail down
MOUNTPOINT`` and the next ``crail up MOUNTPOINT`` find it, after a reboot too.

    HOME/<name>            the state directory unless --state names another
    HOME/mounts/<name>     -> the state directory
"""

from __future__ import annotations

import hashlib
import os
import urllib.parse
from pathlib import Path
from typing import Final

from crailfs.embedded.state import State
from crailfs.errors import UnavailableError

_NAME_MAX: Final = 100
"""Leaves room for the sockets' names in a Unix socket's path."""


def absolute(mountpoint: Path) -> Path:
    """Without symbolic links, and without a look at the mount point itself (it may be dead)."""
    whole = Path(os.path.abspath(mountpoint))
    return whole.parent.resolve() / whole.name if whole.name else whole


def home() -> Path:
    """Where embedded file systems of this user live: ``CRAIL_STATE_HOME``, else for root
    ``/var/lib/crailfs``, else ``~/.local/state/crailfs`` (``XDG_STATE_HOME``)."""
    named = os.environ.get("CRAIL_STATE_HOME")
    if named:
        return Path(named).absolute()
    if os.geteuid() == 0:
        return Path("/var/lib/crailfs")
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "crailfs"


def name_of(mountpoint: Path) -> str:
    """A file name for a mount point: ``/mnt/crail`` -> ``mnt-crail``; different for each."""
    parts = absolute(mountpoint).parts[1:]
    name = "-".join(urllib.parse.quote(part, safe="").replace("-", "%2D") for part in parts)
    if len(name) > _NAME_MAX:
        return hashlib.sha256(os.fsencode(absolute(mountpoint))).hexdigest()[:32]
    return name or "%2F"


def state_of(mountpoint: Path) -> State | None:
    """The state directory that was last up at ``mountpoint``; None: none, or it is gone."""
    link = home() / "mounts" / name_of(mountpoint)
    try:
        state = State(Path(os.readlink(link)))
    except FileNotFoundError:
        state = State(home() / name_of(mountpoint))
    return state if state.exists else None


def default_state(mountpoint: Path) -> State:
    """The state directory for a mount point when none is named: its last one, or a new one."""
    return state_of(mountpoint) or State(home() / name_of(mountpoint))


def remember(mountpoint: Path, state: State) -> None:
    mounts = home() / "mounts"
    mounts.mkdir(mode=0o700, parents=True, exist_ok=True)
    new = mounts / f".{name_of(mountpoint)}.{os.getpid()}"
    new.symlink_to(state.directory)
    new.rename(mounts / name_of(mountpoint))


def forget(mountpoint: Path) -> None:
    mounts = home() / "mounts"
    (mounts / name_of(mountpoint)).unlink(missing_ok=True)
    for directory in (mounts, home()):
        try:
            directory.rmdir()
        except OSError:
            return  # not empty: others are registered


def running_states() -> list[tuple[Path, State]]:
    """Mount point and state of every embedded file system of this user that runs."""
    mounts = home() / "mounts"
    if not mounts.is_dir():
        return []
    found = []
    for name in sorted(os.listdir(mounts)):
        if name.startswith("."):
            continue
        state = State(Path(os.readlink(mounts / name)))
        running = state.read_running() if state.locked_by() is not None else None
        if running is not None and name_of(Path(running.mountpoint)) == name:
            found.append((Path(running.mountpoint), state))
    return found


def running_state_at(mountpoint: Path) -> State:
    """Raises ``UnavailableError`` if no embedded file system runs there."""
    state = state_of(mountpoint)
    if state is None or state.locked_by() is None:
        raise UnavailableError(
            f"no embedded file system runs at {mountpoint}: start it with `crail up {mountpoint}`"
        )
    return state
