"""The directory to mount on: whether it can be, and how it is given back."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from crailfs.embedded import registry
from crailfs.errors import BusyError, ConfigurationError, UnavailableError
from fuse_client.mountpoints import Mount, abort_and_unmount, find_mount, is_dead

_DEVICE: Final = Path("/dev/fuse")
_UNMOUNT_TIMEOUT_S: Final = 60.0
"""What was written through the mount is committed in it."""
_USERS_SHOWN_MAX: Final = 8


class User(NamedTuple):
    """A process that keeps a mount busy."""

    pid: int
    name: str


def prepare_mountpoint(mountpoint: Path, *, allow_nonempty: bool) -> None:
    """Make sure that a mount at ``mountpoint`` can succeed; a dead one there is taken away first.

    Raises:
        BusyError: CrailFS is mounted there already, and alive.
        ConfigurationError: not a directory, not empty, or no FUSE on this host.
    """
    clean_dead_mount(mountpoint)
    if find_mount(mountpoint) is not None:
        raise BusyError(
            f"{mountpoint} is already mounted by CrailFS{_served_by(mountpoint)}: use it, or "
            f"unmount it with `crail down {mountpoint}` or `crail umount {mountpoint}`"
        )
    if not mountpoint.exists():
        raise ConfigurationError(f"{mountpoint} does not exist: mkdir -p {mountpoint}")
    if not mountpoint.is_dir():
        raise ConfigurationError(f"{mountpoint} is not a directory: name another mount point")
    if not allow_nonempty and any(mountpoint.iterdir()):
        raise ConfigurationError(
            f"{mountpoint} is not empty: name another mount point, or hide what is in it for as "
            "long as it is mounted with --nonempty"
        )
    _check_fuse()


def clean_dead_mount(mountpoint: Path) -> bool:
    """Take away a mount whose process has died; whether there was one."""
    mount = find_mount(mountpoint)
    if mount is None or not is_dead(mount):
        return False
    abort_and_unmount(mount)
    return True


def unmount(mountpoint: Path, *, force: bool) -> None:
    """Unmount CrailFS from ``mountpoint``. Everything written is committed first, unless the mount
    is dead. With ``force`` also while processes use it; they get errors from then on.

    Raises:
        UnavailableError: nothing of ours is mounted there.
        BusyError: names the processes that use it.
    """
    mount = find_mount(mountpoint)
    if mount is None:
        raise UnavailableError(f"no CrailFS is mounted at {mountpoint}")
    if is_dead(mount):
        abort_and_unmount(mount)
        return
    reason = _unmount(mount, lazily=force)
    if find_mount(mountpoint) != mount:
        return
    users = list(users_of(mountpoint))
    if users:
        shown = ", ".join(f"{user.name} (pid {user.pid})" for user in users[:_USERS_SHOWN_MAX])
        more = f" and {len(users) - _USERS_SHOWN_MAX} more" if len(users) > _USERS_SHOWN_MAX else ""
        reason = f"in use by {shown}{more}"
    raise BusyError(
        f"{mountpoint} cannot be unmounted: {reason}: end what uses it, or give --force to unmount "
        "it all the same"
    )


def users_of(mountpoint: Path) -> Iterator[User]:
    """Processes with a file, a working directory or a mapping below ``mountpoint``, as far as we
    may see them. Only reads ``/proc``: a mount that does not answer cannot hold us up."""
    inside = os.fsencode(mountpoint) + b"/"
    for entry in sorted((each for each in os.listdir("/proc") if each.isdigit()), key=int):
        directory = Path("/proc", entry)
        if any(path + b"/" == inside or path.startswith(inside) for path in _paths_of(directory)):
            try:
                yield User(int(entry), (directory / "comm").read_text().strip())
            except (FileNotFoundError, ProcessLookupError):
                continue


def _paths_of(process: Path) -> Iterator[bytes]:
    try:
        links = [process / name for name in ("cwd", "root", "exe")]
        links += [process / "fd" / name for name in os.listdir(process / "fd")]
        for link in links:
            try:
                yield os.readlink(os.fsencode(link))
            except FileNotFoundError:
                continue  # closed meanwhile, or a kernel thread
        for line in (process / "maps").read_bytes().splitlines():
            fields = line.split(maxsplit=5)
            if len(fields) == 6:
                yield fields[5]
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return  # ended meanwhile, or not ours to see


def _served_by(mountpoint: Path) -> str:
    state = registry.state_of(mountpoint)
    pid = state.locked_by() if state is not None else None
    return "" if state is None or pid is None else f" (state {state.directory}, pid {pid})"


def _unmount(mount: Mount, *, lazily: bool) -> str:
    """Try; what the unmounting program said."""
    if os.geteuid() == 0:
        command = ["umount", "--internal-only", *(["--lazy"] if lazily else [])]
    else:
        command = ["fusermount3", "-u", *(["-z"] if lazily else [])]
    try:
        done = subprocess.run(
            [*command, str(mount.mountpoint)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_UNMOUNT_TIMEOUT_S,
            check=False,
            env={**os.environ, "LC_ALL": "C"},
        )
    except subprocess.TimeoutExpired:
        return f"{command[0]} has not ended within {_UNMOUNT_TIMEOUT_S:g} s"
    except OSError as error:
        return f"{command[0]}: {error.strerror}"
    return done.stderr.strip().replace("\n", " ")


def _check_fuse() -> None:
    if not _DEVICE.exists():
        raise ConfigurationError(
            f"{_DEVICE} does not exist: load the kernel's FUSE module (`modprobe fuse`); in a "
            "container give it the device (`--device /dev/fuse --cap-add SYS_ADMIN`)"
        )
    if os.geteuid() == 0:
        return
    if shutil.which("fusermount3") is None:
        raise ConfigurationError(
            "fusermount3 is not installed, without which only root can mount: install the package "
            "fuse3 (`apt install fuse3`)"
        )
    if not os.access(_DEVICE, os.R_OK | os.W_OK):
        raise ConfigurationError(f"{_DEVICE} is closed to you: chmod 666 {_DEVICE} as root")
