"""A process that outlives the mount's and cleans up after it.

When the process that serves a mount dies, even by SIGKILL, the mount point stays and answers
ENOTCONN, and what was waiting may wait on. The watchdog holds the reading end of a pipe whose
writing end only the mount process has: end of file means that it is gone. Then, if the mount is
still there, its connection is aborted and it is unmounted.

Run as ``python -m fuse_client.watchdog MOUNTPOINT DEVICE SOURCE ID < pipe``. It never touches the
mount's files, so it cannot hang on them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from fuse_client.mountpoints import Mount, abort_and_unmount


@contextlib.contextmanager
def watched(mount: Mount) -> Iterator[None]:
    """A watchdog cleans ``mount`` up if this process ends inside, in whatever way."""
    reading, writing = os.pipe()
    package_root = str(Path(__file__).resolve().parent.parent)
    try:
        child = subprocess.Popen(
            [
                sys.executable, "-m", "fuse_client.watchdog",
                str(mount.mountpoint), mount.device, mount.source, str(mount.id),
            ],
            stdin=reading,
            stdout=subprocess.DEVNULL,
            cwd="/",
            env={**os.environ, "PYTHONPATH": package_root},
            start_new_session=True,
        )  # fmt: skip
    except OSError:
        os.close(writing)
        raise
    finally:
        os.close(reading)
    try:
        yield
    finally:
        os.close(writing)
        child.wait()


def main(arguments: list[str]) -> None:
    mountpoint, device, source, mount_id = arguments
    mount = Mount(Path(mountpoint), device, source, int(mount_id))
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    while os.read(0, 1):
        pass
    abort_and_unmount(mount)


if __name__ == "__main__":
    main(sys.argv[1:])
