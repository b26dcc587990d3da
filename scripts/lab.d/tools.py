"""The host's programs that the lab needs: Debian packages, installed where that is possible."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

from processes import dies_with_us

INSTALL_LIMIT_S = 600
_PROGRAMS = {
    "qemu-system-x86_64": "qemu-system-x86",
    "debootstrap": "debootstrap",
    "mkfs.ext4": "e2fsprogs",
    "unshare": "util-linux",
    "git": "git",
}
_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


class Unavailable(Exception):  # noqa: N818 - not an error: the lab is skipped
    """This host cannot run the lab; str() says why."""


def missing_packages() -> list[str]:
    """Debian packages whose programs this host lacks."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = [
        package for program, package in _PROGRAMS.items() if not shutil.which(program, path=path)
    ]
    return missing + ([] if _KEYRING.exists() else ["debian-archive-keyring"])


def ensure_tools() -> None:
    """Installs what is missing.

    Raises:
        Unavailable: this is no x86-64 host, or the packages cannot be installed.
    """
    if platform.machine() != "x86_64":
        raise Unavailable(f"the guests' image is for x86-64, and this host is {platform.machine()}")
    missing = missing_packages()
    if not missing:
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise Unavailable(f"missing Debian packages: {' '.join(missing)}")
    print(f"lab: installing {' '.join(missing)}", flush=True)
    install = ["apt-get", "install", "--yes", "--no-install-recommends", *missing]
    if _done(install) or (_done(["apt-get", "update"]) and _done(install)):
        return
    raise Unavailable(f"these Debian packages cannot be installed: {' '.join(missing)}")


def _done(argv: list[str]) -> bool:
    done = subprocess.run(
        argv,
        check=False,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"},
        timeout=INSTALL_LIMIT_S,
        preexec_fn=dies_with_us(),
    )
    return done.returncode == 0
