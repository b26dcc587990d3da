"""``crail up`` and ``crail down``: real servers, a real mount."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from crailfs.embedded.state import State
from crailfs.records import Tier
from fuse_client.mountpoints import find_mount, is_dead
from tests.support.embedded import SMALL, Embedded, embedded
from tests.support.processes import is_running, wait_until

pytestmark = [pytest.mark.mount, pytest.mark.timeout(60)]

MEMORY_BYTES = os.urandom(3_000_000)
DISK_BYTES = os.urandom(2_000_000)


@pytest.fixture
def system(tmp_path: Path) -> Iterator[Embedded]:
    with embedded(tmp_path) as made:
        yield made


def bring_up(system: Embedded, *options: str) -> str:
    done = system.up(*options)
    assert done.returncode == 0, done.stderr + system.logs()
    return done.stdout


def used_bytes(system: Embedded) -> dict[str, int]:
    return {tier["tier"]: tier["used_bytes"] for tier in system.status()["tiers"]}


def write_to_both_tiers(system: Embedded) -> None:
    (system.mountpoint / "in-memory").write_bytes(MEMORY_BYTES)
    (system.mountpoint / "slow").mkdir()
    assert system.fs("setclass", "/slow", "disk").returncode == 0
    (system.mountpoint / "slow" / "on-disk").write_bytes(DISK_BYTES)


def check_both_tiers(system: Embedded) -> None:
    assert (system.mountpoint / "in-memory").read_bytes() == MEMORY_BYTES
    assert (system.mountpoint / "slow" / "on-disk").read_bytes() == DISK_BYTES
    used = used_bytes(system)
    assert used["memory"] >= len(MEMORY_BYTES)
    assert used["disk"] >= len(DISK_BYTES)


def test_up_states_its_sizes_and_down_keeps_the_data(system: Embedded) -> None:
    told = bring_up(system)
    assert "memory  64.0 MiB  as asked" in told
    assert "disk    64.0 MiB  as asked" in told
    assert f"state   {system.state.directory}" in told
    write_to_both_tiers(system)
    pids = system.pids()
    assert len(pids) == 4
    down = system.down()
    assert down.returncode == 0, down.stderr
    assert f"its data stays in {system.state.directory}" in down.stdout
    assert find_mount(system.mountpoint) is None
    wait_until(lambda: not any(map(is_running, pids)), "all processes have ended")
    # Without --state: the mount point alone finds it again.
    again = system.crail("up", str(system.mountpoint))
    assert again.returncode == 0, again.stderr + system.logs()
    check_both_tiers(system)
    assert system.crail("fsck", "--data", "--at", str(system.mountpoint)).returncode == 0


def test_destroy_leaves_nothing(system: Embedded) -> None:
    bring_up(system)
    (system.mountpoint / "x").write_bytes(b"x" * 100_000)
    pids = system.pids()
    memory_region = system.state.regions()[Tier.MEMORY][0]
    assert memory_region.parent == Path("/dev/shm")
    assert memory_region.exists()
    down = system.down("--destroy")
    assert down.returncode == 0, down.stderr
    assert find_mount(system.mountpoint) is None
    wait_until(lambda: not any(map(is_running, pids)), "all processes have ended")
    assert not memory_region.exists()
    assert not system.state.directory.exists()
    assert os.listdir(system.mountpoint) == []
    assert not (system.directory / "home").exists()


def test_a_killed_process_comes_back_with_the_data(system: Embedded) -> None:
    bring_up(system)
    write_to_both_tiers(system)
    for name in ("storage", "metadata", "mount"):
        pid = system.pid(name)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not is_running(pid), f"{name} has ended")  # noqa: B023
        wait_until(
            lambda: system.running.processes[name].restart_count == 1,  # noqa: B023
            f"{name} is started again",
        )
        assert system.pid(name) != pid
    check_both_tiers(system)
    assert f"mount (pid {pid}) ended: killed by SIGKILL" in system.logs()


def test_up_after_everything_was_killed_cleans_the_dead_mount(system: Embedded) -> None:
    bring_up(system)
    write_to_both_tiers(system)
    # As after a power cut, but for the memory: nobody is left to clean up.
    cleaners = children_of(system.pid("mount"))
    for pid in [*system.pids()[:1], *cleaners, *system.pids()[1:]]:
        os.kill(pid, signal.SIGKILL)
    mount = find_mount(system.mountpoint)
    assert mount is not None
    wait_until(lambda: is_dead(mount), "the mount is dead")
    assert system.state.read_running() is not None
    bring_up(system)
    check_both_tiers(system)


def children_of(parent: int) -> list[int]:
    tasks = Path(f"/proc/{parent}/task").glob("*/children")
    return [int(pid) for task in tasks for pid in task.read_text().split()]


def test_a_killed_supervisor_is_replaced(system: Embedded) -> None:
    bring_up(system)
    (system.mountpoint / "x").write_bytes(MEMORY_BYTES)
    before = system.pids()
    os.kill(before[0], signal.SIGKILL)
    wait_until(lambda: not is_running(before[0]), "the supervisor has ended")
    # What it served goes on without it, and the next one takes over.
    assert (system.mountpoint / "x").read_bytes() == MEMORY_BYTES
    bring_up(system)
    assert (system.mountpoint / "x").read_bytes() == MEMORY_BYTES
    assert not any(map(is_running, before))
    os.kill(system.pids()[0], signal.SIGKILL)
    down = system.down()
    assert down.returncode == 0, down.stderr
    assert find_mount(system.mountpoint) is None


def test_sigterm_to_the_supervisor_is_down_and_commits_what_is_open(system: Embedded) -> None:
    bring_up(system)
    pids = system.pids()
    fd = os.open(system.mountpoint / "open", os.O_WRONLY | os.O_CREAT)
    try:
        assert os.write(fd, MEMORY_BYTES) == len(MEMORY_BYTES)
        os.kill(pids[0], signal.SIGTERM)
        wait_until(lambda: not any(map(is_running, pids)), "all processes have ended", 4.0)
    finally:
        with contextlib.suppress(OSError):  # its mount has gone
            os.close(fd)
    assert find_mount(system.mountpoint) is None
    assert system.state.read_running() is None
    bring_up(system)
    assert (system.mountpoint / "open").read_bytes() == MEMORY_BYTES


def test_unmounting_by_hand_is_down(system: Embedded) -> None:
    bring_up(system)
    pids = system.pids()
    assert system.crail("umount", str(system.mountpoint)).returncode == 0
    wait_until(lambda: not any(map(is_running, pids)), "all processes have ended")
    assert system.down().returncode == 3


def test_a_busy_mount_names_who_uses_it(system: Embedded) -> None:
    bring_up(system)
    code = "import sys; print('in', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-S", "-c", code],
        cwd=system.mountpoint,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as user:
        assert user.stdout is not None
        user.stdout.readline()
        refused = system.down()
        assert refused.returncode == 4
        assert f"(pid {user.pid})" in refused.stderr
        assert "--force" in refused.stderr
        assert (system.mountpoint / ".").is_dir()
        forced = system.down("--force")
        assert forced.returncode == 0, forced.stderr
        assert find_mount(system.mountpoint) is None
        user.kill()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--memory", "1MiB"), "--memory: 1.0 MiB is too little: at least 16.0 MiB, or 0"),
        (("--memory", "0", "--disk", "0"), "a file system needs memory or disk"),
        (("--memory", "999TiB"), "--memory 999 TiB: more than there is"),
        (("--disk", "99999TiB"), "--disk 99999 TiB: more than the"),
        (("--memory", "much"), "expected a size such as '4GiB', '512MiB' or a number of bytes"),
    ],
)
def test_sizes_that_cannot_be(system: Embedded, options: tuple[str, ...], message: str) -> None:
    done = system.crail("up", str(system.mountpoint), *options)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (system.directory / "home").exists()


def test_mount_points_that_cannot_be(system: Embedded) -> None:
    (system.directory / "file").write_text("")
    (system.directory / "full").mkdir()
    (system.directory / "full" / "x").write_text("")
    for name, message in (
        ("none", "none does not exist: mkdir -p"),
        ("file", "file is not a directory"),
        ("full", "full is not empty: name another mount point, or"),
    ):
        done = system.crail("up", str(system.directory / name), *SMALL)
        assert done.returncode == 2
        assert message in done.stderr


def test_state_directories_that_cannot_be(system: Embedded) -> None:
    mountpoint = str(system.mountpoint)
    foreign = system.directory / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("")
    done = system.crail("up", mountpoint, "--state", str(foreign), *SMALL)
    assert done.returncode == 2
    assert f"{foreign} is not empty and holds no crail.toml" in done.stderr
    deep = system.directory / ("d" * 100)
    done = system.crail("up", mountpoint, "--state", str(deep), *SMALL)
    assert done.returncode == 2
    assert "too long for a Unix socket" in done.stderr
    assert not deep.exists()


def test_sizes_of_an_existing_state_cannot_change(system: Embedded) -> None:
    bring_up(system)
    assert system.down().returncode == 0
    done = system.up("--memory", "128MiB")
    assert done.returncode == 2
    assert "was made with 64.0 MiB, which cannot be changed" in done.stderr


def test_a_failed_start_says_why_and_leaves_nothing(system: Embedded) -> None:
    bring_up(system)
    assert system.down().returncode == 0
    region = system.state.regions()[Tier.DISK][0]
    region.write_bytes(b"\xff" * region.stat().st_size)
    done = system.up()
    assert done.returncode == 4, done.stderr
    assert str(region) in done.stderr
    assert find_mount(system.mountpoint) is None
    assert system.state.locked_by() is None


def test_status_of_what_does_not_run(system: Embedded) -> None:
    none = system.crail("status")
    assert (none.returncode, none.stdout) == (3, "")
    assert "start one with `crail up MOUNTPOINT`" in none.stderr
    at = system.crail("status", "--at", str(system.mountpoint))
    assert at.returncode == 3
    assert f"no embedded file system runs at {system.mountpoint}" in at.stderr
    down = system.down()
    assert down.returncode == 3
    assert State(system.directory / "home").exists is False
