"""How a mount ends: unmounted, stopped, killed; and how a dead one is told from a live one."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from fuse_client.mountpoints import abort_and_unmount, find_mount, is_dead
from tests.support.mounts import in_child, mounted
from tests.support.process_cluster import ProcessCluster
from tests.support.processes import run_crail, wait_until


@pytest.fixture
def options(cluster: ProcessCluster) -> list[str]:
    return ["--config", str(cluster.configuration)]


def test_a_mount_says_what_it_is(cluster: ProcessCluster) -> None:
    mount = find_mount(cluster.mountpoint)
    assert mount is not None
    assert mount.source == "crailfs"
    assert not is_dead(mount)
    assert find_mount(cluster.state) is None
    described = Path("/proc/self/mountinfo").read_text()
    (line,) = [line for line in described.splitlines() if f" {cluster.mountpoint} " in line]
    assert " fuse.crailfs crailfs " in line
    assert "default_permissions" in line


def test_umount_ends_the_mount_process(place: Path, options: list[str], tmp_path: Path) -> None:
    mountpoint = tmp_path / "a mount point"
    with mounted(mountpoint, options, tmp_path / "log") as process:
        (mountpoint / place.name / "file").write_bytes(b"x")
        subprocess.run(["umount", str(mountpoint)], check=True, timeout=20)
        assert process.process.wait(10) == 0
    assert (place / "file").read_bytes() == b"x"


def test_a_stopped_mount_commits_what_is_open(
    place: Path, options: list[str], tmp_path: Path
) -> None:
    mountpoint = tmp_path / "mnt"
    with mounted(mountpoint, options, tmp_path / "log") as process:
        fd = os.open(mountpoint / place.name / "file", os.O_WRONLY | os.O_CREAT)
        try:
            os.write(fd, b"not closed" * 10_000)
            assert process.stop() == 0
            assert find_mount(mountpoint) is None
            with pytest.raises(OSError):
                os.write(fd, b"too late")
        finally:
            with pytest.raises(OSError):
                os.close(fd)
    assert (place / "file").read_bytes() == b"not closed" * 10_000


def test_a_killed_mount_is_cleaned_up_by_its_watchdog(
    place: Path, options: list[str], tmp_path: Path
) -> None:
    mountpoint = tmp_path / "mnt"
    with mounted(mountpoint, options, tmp_path / "log") as process:
        (mountpoint / place.name / "file").write_bytes(b"closed")
        os.kill(process.pid, signal.SIGKILL)
        process.process.wait(10)
        wait_until(lambda: find_mount(mountpoint) is None, "the watchdog unmounts")
        assert os.listdir(mountpoint) == []
    assert (place / "file").read_bytes() == b"closed"


def test_a_hanging_mount_is_dead_and_can_be_taken_away(
    place: Path, options: list[str], tmp_path: Path
) -> None:
    mountpoint = tmp_path / "mnt"
    with mounted(mountpoint, options, tmp_path / "log") as process:
        mount = find_mount(mountpoint)
        assert mount is not None
        os.kill(process.pid, signal.SIGSTOP)
        try:
            assert is_dead(mount)
            abort_and_unmount(mount)
            assert find_mount(mountpoint) is None
        finally:
            os.kill(process.pid, signal.SIGCONT)
        process.process.wait(10)


def test_mounting_twice_is_refused(cluster: ProcessCluster, options: list[str]) -> None:
    done = run_crail("mount", str(cluster.mountpoint), *options)
    assert done.returncode == 4
    assert "already mounted" in done.stderr
    assert in_child(lambda: os.listdir(cluster.mountpoint)) is not None


def test_read_ahead_is_raised(cluster: ProcessCluster) -> None:
    mount = find_mount(cluster.mountpoint)
    assert mount is not None
    assert Path(f"/sys/class/bdi/{mount.device}/read_ahead_kb").read_text() == "1024\n"
