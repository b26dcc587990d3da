"""Mounts of CrailFS on this host, seen from outside: find them, tell dead ones, take them down.

Nothing here opens a file of the mount: a process that does can hang in the kernel where not even
SIGKILL reaches it. A mount that may be dead is only ever touched from a child process.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Final, NamedTuple

from crailfs.errors import BusyError

FILE_SYSTEM_TYPE: Final = "fuse.crailfs"
ANSWER_TIMEOUT_S: Final = 2.0
"""A mount that does not answer statvfs within this is dead."""
DEAD_ERRNOS: Final = frozenset({errno.ENOTCONN, errno.ECONNABORTED})
UNMOUNT_TIMEOUT_S: Final = 10.0

_CONNECTIONS: Final = Path("/sys/fs/fuse/connections")
_MOUNTINFO: Final = Path("/proc/self/mountinfo")
_MNT_DETACH: Final = 2
_PROBE: Final = """
import os, sys
try:
    os.statvfs(sys.argv[1])
except OSError as error:
    sys.exit(min(error.errno, 255))
"""


class Mount(NamedTuple):
    mountpoint: Path
    device: str
    """``major:minor`` of the mounted file system, unique among those that are mounted."""
    source: str
    id: int
    """The kernel's number of this mount."""

    @property
    def connection(self) -> Path:
        """Directory of the FUSE connection's controls; the kernel names it by the minor number."""
        return _CONNECTIONS / self.device.partition(":")[2]


def list_mounts() -> list[Mount]:
    """Every CrailFS mount that this process can see, dead ones too, in the order of mounting."""
    mounts = []
    for line in _MOUNTINFO.read_bytes().splitlines():
        head, _, tail = line.partition(b" - ")
        mount_id, _, device, _, mountpoint = head.split(b" ")[:5]
        file_system_type, source = tail.split(b" ")[:2]
        if file_system_type == FILE_SYSTEM_TYPE.encode():
            mounts.append(
                Mount(
                    Path(os.fsdecode(_unescape(mountpoint))),
                    device.decode(),
                    os.fsdecode(_unescape(source)),
                    int(mount_id),
                )
            )
    return mounts


def find_mount(path: Path) -> Mount | None:
    """The CrailFS mounted exactly at ``path`` (the uppermost of several), or ``None``."""
    # Not Path.resolve: it would look at the mount point itself, which may not answer.
    absolute = path.parent.resolve() / path.name if path.name else path.resolve()
    found = [mount for mount in list_mounts() if mount.mountpoint == absolute]
    return found[-1] if found else None


def is_dead(mount: Mount) -> bool:
    """Whether nobody serves ``mount`` any more. Takes at most ``ANSWER_TIMEOUT_S``."""
    child = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _PROBE, str(mount.mountpoint)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        return child.wait(ANSWER_TIMEOUT_S) in DEAD_ERRNOS
    except subprocess.TimeoutExpired:
        # Not waited for: it ends when the connection is aborted, and maybe not before.
        child.kill()
        return True


def abort_and_unmount(mount: Mount) -> None:
    """Ends whatever waits for ``mount`` with an error and takes the mount away, used or not.

    Raises ``BusyError`` with the cause if it is still mounted afterwards. That it is gone already
    is success.
    """
    if not _still_mounted(mount):
        return
    try:
        (mount.connection / "abort").write_text("1")
    except FileNotFoundError:
        pass  # the connection has ended, only the mount is left
    except PermissionError as error:
        raise BusyError(
            f"{mount.mountpoint} was mounted by another user ({error}): unmount it as that user "
            "or as root"
        ) from error
    reason = _detach(mount.mountpoint)
    if _still_mounted(mount):
        raise BusyError(f"{mount.mountpoint} cannot be unmounted: {reason}")


def _still_mounted(mount: Mount) -> bool:
    return any(other.id == mount.id and other.device == mount.device for other in list_mounts())


def _detach(mountpoint: Path) -> str:
    """Unmounts lazily; what went wrong, if anything did."""
    if os.geteuid() == 0:
        command = ["umount", "--lazy", "--internal-only", str(mountpoint)]
    else:
        command = ["fusermount3", "-u", "-z", str(mountpoint)]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=UNMOUNT_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return done.stderr.strip()


def _unescape(field: bytes) -> bytes:
    r"""mountinfo writes space, tab, newline and backslash as ``\040`` and so on."""
    if b"\\" not in field:
        return field
    first, *rest = field.split(b"\\")
    return first + b"".join(bytes([int(part[:3], 8)]) + part[3:] for part in rest)
