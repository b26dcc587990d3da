"""The checkout as a guest sees it: a read-only disk with the modules already compiled.

A disk, not a shared directory: from it the guest imports the servers and the client in 4 s, through
9p in 14 s (measured in the lab, with nothing cached).
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from pathlib import Path

from image import CHECKOUT, GUEST, Image, cache
from processes import dies_with_us

LIMIT_S = 300
_TOP = ("crailfs", "metadata_server", "storage_server", "fuse_client", "tests", "scripts")


def make_disk(image: Image, disk: Path) -> None:
    """Writes the checkout's files, as they are now, into ``disk`` (ext4).

    A tree in the cache is brought up to date first, so that only changed modules are compiled.

    Raises:
        subprocess.CalledProcessError: a module does not compile, or the disk cannot be made.
    """
    staging = cache() / f"source-{image.directory.name}"
    with open(cache() / "source.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _update(staging)
        os.utime(staging)
        _compile(image, staging)
        subprocess.run(
            ["mkfs.ext4", "-q", "-F", "-O", "^has_journal", "-d", str(staging), str(disk), "128M"],
            check=True,
            stdout=subprocess.DEVNULL,
            timeout=LIMIT_S,
            preexec_fn=dies_with_us(),
        )


def _update(staging: Path) -> None:
    argv = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--"]
    listed = subprocess.run(
        [*argv, *_TOP, "pyproject.toml"],
        cwd=CHECKOUT,
        capture_output=True,
        check=True,
    )
    names = {os.fsdecode(name) for name in listed.stdout.split(b"\0") if name}
    names = {name for name in names if (CHECKOUT / name).is_file()}
    # What the installed package says of itself, for `crail --version`.
    egg = CHECKOUT / "crailfs.egg-info/PKG-INFO"
    names |= {str(egg.relative_to(CHECKOUT))} if egg.exists() else set()
    for old in sorted(staging.rglob("*")) if staging.exists() else ():
        if old.is_file() and old.suffix != ".pyc" and str(old.relative_to(staging)) not in names:
            old.unlink()
    for name in names:
        source, target = CHECKOUT / name, staging / name
        status = source.stat()
        if target.exists():
            there = target.stat()
            if (there.st_mtime_ns, there.st_size) == (status.st_mtime_ns, status.st_size):
                continue
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)


def _compile(image: Image, staging: Path) -> None:
    # The image's own Python, run from its directory: the host's may be of another version. It
    # cannot start itself again (by its path it would take the host's C library): one process.
    root = image.root
    argv = [str(root / "usr/lib64/ld-linux-x86-64.so.2"), "--library-path"]
    argv += [str(root / "usr/lib/x86_64-linux-gnu"), str(root / "usr/bin/python3.13"), "-s", "-P"]
    subprocess.run(
        [*argv, str(GUEST / "compile.py"), str(staging)],
        env={
            "PYTHONHOME": str(root / "usr"),
            "PYTHONPATH": str(root / "usr/lib/python3/dist-packages"),
            "PATH": os.environ["PATH"],
        },
        check=True,
        timeout=LIMIT_S,
        preexec_fn=dies_with_us(),
    )
