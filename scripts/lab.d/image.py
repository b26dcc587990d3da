"""The lab's image: Debian 13 with what CrailFS needs, its kernel, and a small initrd.

Made once for each recipe (this file, what it copies, and the locked versions that it takes) and
kept in a cache directory named after the recipe's hash. The image never holds the checkout.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import lzma
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from processes import dies_with_us
from tools import Unavailable, ensure_tools

CHECKOUT = Path(__file__).resolve().parents[2]
GUEST = Path(__file__).resolve().parent / "guest"
SUITE = "trixie"
PACKAGES = (
    "busybox-static",
    "daxctl",
    "dmsetup",
    "e2fsprogs",
    "fuse3",
    "ibverbs-providers",
    "ibverbs-utils",
    "iproute2",
    "kmod",
    "libpmem1",
    "libpmemobj1",
    "linux-image-amd64",
    "ndctl",
    "nvme-cli",
    "procps",
    "python3",
    "python3-hypothesis",
    "python3-msgspec",
    "python3-pyfuse3",
    "python3-pytest",
    "python3-pytest-timeout",
    "python3-pyverbs",
    "python3-trio",
    "rdma-core",
    "util-linux",
)
LOCKED = ("lmdb", "xxhash")
"""What Debian 13 lacks or has older than pyproject.toml asks for: wheels of requirements.lock."""
MODULES = (
    "virtio_blk",
    "ext4",
    "crc32c_generic",
    "crc32_generic",
    "virtio_net",
    "9p",
    "9pnet_virtio",
    "nfit",
    "nd_pmem",
    "dax_pmem",
    "device_dax",
    "nvme",
    "rdma_rxe",
    "rdma_ucm",
)
"""Loaded by the initrd, with what they depend on; anything else loads on demand."""
BUILD_LIMIT_S = 1200
UNUSED_LIMIT_S = 7 * 86400
_WHEEL_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


@dataclass(frozen=True)
class Image:
    """One finished image."""

    directory: Path

    @property
    def disk(self) -> Path:
        return self.directory / "disk.img"

    @property
    def kernel(self) -> Path:
        return self.directory / "vmlinuz"

    @property
    def initrd(self) -> Path:
        return self.directory / "initrd"

    @property
    def root(self) -> Path:
        """The same files as on the disk: the guest's Python compiles the checkout from here."""
        return self.directory / "root"


def cache() -> Path:
    """Where images are kept: ``$XDG_CACHE_HOME/crailfs-lab``, ``~/.cache/crailfs-lab``."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "crailfs-lab"


def locked_requirements() -> str:
    """The sections of requirements.lock that name LOCKED packages."""
    text = (CHECKOUT / "requirements.lock").read_text()
    sections = re.findall(r"^[a-z0-9][^\n]*\\\n(?:    --hash[^\n]*\n)+", text, re.MULTILINE)
    return "".join(part for part in sections if re.split("[=<> ]", part)[0] in LOCKED)


def recipe_hash() -> str:
    digest = hashlib.sha256()
    for part in (Path(__file__).read_bytes(), (GUEST / "initrd_init").read_bytes()):
        digest.update(part)
    digest.update(locked_requirements().encode())
    return digest.hexdigest()[:16]


def mirror() -> str:
    """``$CRAIL_LAB_MIRROR``, or the Debian mirror that this host's apt uses."""
    if named := os.environ.get("CRAIL_LAB_MIRROR"):
        return named
    listed = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(COMPONENT) $(REPO_URI)"],
        check=False,
        capture_output=True,
        text=True,
    )
    for line in listed.stdout.splitlines():
        component, _, address = line.partition(" ")
        # Not the one of security updates, whose path is longer.
        if component == "main" and address.startswith("http") and address.endswith("/debian/"):
            return address
    raise Unavailable("apt knows no Debian mirror: name one in CRAIL_LAB_MIRROR")


def proxies() -> dict[str, str]:
    """The proxies that this host's apt uses, for debootstrap's downloads."""
    found = {}
    for scheme in ("http", "https"):
        answer = subprocess.run(
            ["apt-config", "shell", "X", f"Acquire::{scheme}::Proxy"],
            check=False,
            capture_output=True,
            text=True,
        )
        if match := re.fullmatch(r"X='(.+)'\s*", answer.stdout):
            found[f"{scheme}_proxy"] = match[1]
    return found


def ensure(*, rebuild: bool = False) -> Image:
    """The image of today's recipe, made now if it is not there (two minutes).

    Raises:
        Unavailable: this host cannot make or run it.
        SystemExit: it could not be made; the log's end has been shown.
    """
    ensure_tools()
    cache().mkdir(parents=True, exist_ok=True)
    target = cache() / recipe_hash()
    with open(cache() / f"{target.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if rebuild:
            shutil.rmtree(target, ignore_errors=True)
        if not target.exists():
            if os.geteuid() != 0:
                raise Unavailable("the guests' image is not there, and making it needs root")
            # What a build that was killed has left.
            for stale in cache().glob(f"{target.name}.build-*"):
                shutil.rmtree(stale)
            building = Path(tempfile.mkdtemp(prefix=f"{target.name}.build-", dir=cache()))
            try:
                _build(building)
                building.chmod(0o755)
                building.rename(target)
            except BaseException:
                shutil.rmtree(building, ignore_errors=True)
                raise
            _forget_old()
        with contextlib.suppress(PermissionError):
            os.utime(target)
    return Image(target)


def _forget_old() -> None:
    """Removes images, and copies of the checkout for them, that nobody has used for a week."""
    for path in cache().iterdir():
        if path.is_dir() and time.time() - path.stat().st_mtime > UNUSED_LIMIT_S:
            shutil.rmtree(path)


def _run(argv: list[str], log: Path, env: dict[str, str] | None = None) -> None:
    with open(log, "ab") as output:
        done = subprocess.run(
            argv,
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | (env or {}),
            timeout=BUILD_LIMIT_S,
            preexec_fn=dies_with_us(),
        )
    if done.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
        raise SystemExit(f"{tail}\n{shlex.join(argv)[:200]} failed with {done.returncode}")


def _build(directory: Path) -> None:
    print(f"lab: making the image in {directory} (about two minutes)", file=sys.stderr, flush=True)
    log = directory / "build.log"
    image = Image(directory)
    wheels = directory / "wheels"
    _download_wheels(wheels, log)
    # A PID namespace of its own: whatever debootstrap starts ends with it, and so do its mounts.
    argv = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--", "debootstrap"]
    argv += ["--variant=minbase", f"--include={','.join(PACKAGES)}"]
    _run([*argv, SUITE, str(image.root), mirror()], log, proxies())
    packages = image.root / "usr/local/lib/python3.13/dist-packages"
    for wheel in sorted(wheels.iterdir()):
        shutil.unpack_archive(wheel, packages, "zip")
    shutil.rmtree(wheels)
    for unneeded in ("var/cache/apt", "var/lib/apt", "usr/share/doc", "usr/share/locale"):
        shutil.rmtree(image.root / unneeded)
        (image.root / unneeded).mkdir()
    for mountpoint in ("src", "lab/out", "mnt/pmem"):
        (image.root / mountpoint).mkdir(parents=True)
    # Nothing is compiled in the guest, where it is slow; pytest keeps compiled plugins as well.
    for script in (
        "import compileall; compileall.compile_dir('/usr/local/lib/python3.13', quiet=1)",
        "import pytest; pytest.main(['--version'])",
    ):
        _run(["chroot", str(image.root), "/usr/bin/python3", "-c", script], log)
    boot = image.root / "boot"
    shutil.copy(next(boot.glob("vmlinuz-*")), image.kernel)
    for unneeded_file in boot.iterdir():
        unneeded_file.unlink()
    image.initrd.write_bytes(_initrd(image.root))
    argv = ["mkfs.ext4", "-q", "-F", "-O", "^has_journal", "-E", "lazy_itable_init=1"]
    _run([*argv, "-d", str(image.root), str(image.disk), "2G"], log)


def _download_wheels(wheels: Path, log: Path) -> None:
    wheels.mkdir()
    requirements = wheels.parent / "requirements.txt"
    requirements.write_text(locked_requirements())
    platforms = [word for name in _WHEEL_PLATFORMS for word in ("--platform", name)]
    argv = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    argv += ["--only-binary", ":all:", "--python-version", "3.13", "--implementation", "cp"]
    _run([*argv, *platforms, "--dest", str(wheels), "-r", str(requirements)], log)


def _initrd(root: Path) -> bytes:
    modules = next((root / "lib/modules").iterdir())
    order = list(_in_order(modules, MODULES))
    archive = _Archive()
    for directory in ("bin", "modules"):
        archive.add(directory, b"", 0o040755)
    archive.add("bin/busybox", (root / "bin/busybox").read_bytes(), 0o100755)
    archive.add("init", (GUEST / "initrd_init").read_bytes(), 0o100755)
    for path in order:
        data = (modules / path).read_bytes()
        archive.add(
            f"modules/{_plain_name(path)}", lzma.decompress(data) if path.endswith(".xz") else data
        )
    names = "".join(f"{_plain_name(path)}\n" for path in order)
    archive.add("modules/order", names.encode())
    return archive.finished()


def _plain_name(path: str) -> str:
    return Path(path).name.removesuffix(".xz")


def _in_order(modules: Path, wanted: Iterable[str]) -> Iterable[str]:
    """The files of the wanted modules, each after those that it needs."""
    needs: dict[str, list[str]] = {}
    for line in (modules / "modules.dep").read_text().splitlines():
        path, _, others = line.partition(":")
        # The kernel lists what is needed last in the order of loading first.
        needs[path] = others.split()[::-1]
    by_name = {_plain_name(path).removesuffix(".ko").replace("-", "_"): path for path in needs}
    seen = set()
    for name in wanted:
        if name not in by_name:
            continue  # built into the kernel, or merged into another module
        for path in [*needs[by_name[name]], by_name[name]]:
            if path not in seen:
                seen.add(path)
                yield path


class _Archive:
    """A cpio archive of the kind that the kernel unpacks (newc)."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._inode = 0

    def add(self, name: str, data: bytes, mode: int = 0o100644) -> None:
        self._inode += 1
        encoded = name.encode() + b"\0"
        fields = (self._inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(encoded), 0)
        header = b"070701" + b"".join(b"%08X" % field for field in fields) + encoded
        self._parts += [header + b"\0" * (-len(header) % 4), data + b"\0" * (-len(data) % 4)]

    def finished(self) -> bytes:
        self.add("TRAILER!!!", b"")
        return b"".join(self._parts)
