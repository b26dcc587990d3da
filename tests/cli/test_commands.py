"""The commands, on one file system that is up for all of these tests."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from crailfs.cli.main import SUBCOMMANDS
from tests.support.embedded import Embedded, embedded
from tests.support.processes import CRAIL, ServerProcess, run_crail

pytestmark = [pytest.mark.mount, pytest.mark.timeout(60)]

NOBODY = 65534


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Embedded]:
    with embedded(tmp_path_factory.mktemp("commands")) as made:
        done = made.up()
        assert done.returncode == 0, done.stderr + made.logs()
        yield made


@pytest.fixture
def directory(system: Embedded, request: pytest.FixtureRequest) -> str:
    """A directory of the file system for one test."""
    path = "/" + re.sub(r"\W", "-", request.node.name)
    assert system.fs("mkdir", path).returncode == 0
    return path


def ok(system: Embedded, *arguments: str) -> str:
    done = system.fs(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def error(system: Embedded, *arguments: str) -> tuple[int, str]:
    done = system.fs(*arguments)
    assert done.stderr.count("\n") == 1, done.stderr
    return done.returncode, done.stderr.removeprefix("crail fs: ").rstrip()


def test_what_is_up_is_refused_a_second_time(system: Embedded) -> None:
    again = system.up()
    assert again.returncode == 4
    assert re.fullmatch(
        rf"crail up: {system.mountpoint} is already mounted by CrailFS "
        rf"\(state {system.state.directory}, pid {system.pids()[0]}\): .*\n",
        again.stderr,
    )
    other = system.directory / "other"
    other.mkdir()
    elsewhere = system.crail("up", str(other), "--state", str(system.state.directory))
    assert elsewhere.returncode == 4
    assert f"is in use by pid {system.pids()[0]}" in elsewhere.stderr
    offline = system.crail("fsck", "--state", str(system.state.directory))
    assert offline.returncode == 4, offline.stderr


def test_status_json(system: Embedded) -> None:
    status = system.status()
    assert set(status) == {
        "cluster_id", "metadata", "epoch", "uptime_seconds", "session_count", "node_count",
        "block_size_bytes", "tiers", "servers", "lost_regions", "counters", "embedded",
    }  # fmt: skip
    assert re.fullmatch(r"[0-9a-f]{32}", status["cluster_id"])
    assert status["node_count"] == 1
    assert status["session_count"] == 1
    assert [tier["tier"] for tier in status["tiers"]] == ["memory", "disk"]
    for tier in status["tiers"]:
        assert tier["total_bytes"] == tier["used_bytes"] + tier["free_bytes"] > 60 << 20
    (server,) = status["servers"]
    assert server["alive"] is True
    assert server["transports"] == ["local", "tcp"]
    assert server["tcp"].startswith("127.0.0.1:")
    assert [region["tier"] for region in server["regions"]] == ["memory", "disk"]
    assert [region["durable"] for region in server["regions"]] == [False, True]
    assert status["embedded"]["mountpoint"] == str(system.mountpoint)
    assert set(status["embedded"]["processes"]) == {"metadata", "storage", "mount"}


def test_who_does_not_know_the_secret_is_refused(system: Embedded) -> None:
    secret = system.directory / "secret"
    secret.write_text("another secret of the right length")
    secret.chmod(0o600)
    config = ("--config", str(system.state.config_file))
    wrong = system.crail("status", *config, "--set", f"cluster.secret_file={secret}")
    assert wrong.returncode == 5, wrong.stderr
    assert "secret" in wrong.stderr
    assert wrong.stderr.count("\n") == 1
    other = system.crail("status", *config, "--set", f"cluster.id={'0' * 32}")
    assert other.returncode == 5
    assert "0" * 32 in other.stderr


def test_top_shows_rates(system: Embedded) -> None:
    done = system.crail("top", "--rounds", "2", "--interval", "0.1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("metadata server ") == 2
    assert ", 1 clients, up " in done.stdout
    assert re.search(r"requests_get_status +\d+ +\d+\.\d\n", done.stdout)


def test_what_is_put_is_got_back(system: Embedded, directory: str, tmp_path: Path) -> None:
    content = os.urandom(5_000_001)
    (tmp_path / "in").write_bytes(content)
    ok(system, "put", str(tmp_path / "in"), f"{directory}/file")
    ok(system, "get", f"{directory}/file", str(tmp_path / "out"))
    assert (tmp_path / "out").read_bytes() == content
    assert Path(f"{system.mountpoint}{directory}/file").read_bytes() == content
    # Into directories, under the name that it had; replacing what was longer.
    (tmp_path / "file").write_bytes(b"short")
    ok(system, "put", str(tmp_path / "file"), directory)
    (tmp_path / "into").mkdir()
    ok(system, "get", f"{directory}/file", str(tmp_path / "into"))
    assert (tmp_path / "into" / "file").read_bytes() == b"short"


def test_put_and_get_in_a_pipeline(system: Embedded, directory: str) -> None:
    at = ("--at", str(system.mountpoint))
    subprocess.run(
        [*CRAIL, "fs", "put", "-", f"{directory}/x", *at],
        input=b"through a pipe",
        env=system.environment,
        timeout=30,
        check=True,
    )
    assert ok(system, "get", f"{directory}/x", "-") == "through a pipe"


def test_ls_and_tree(system: Embedded, directory: str) -> None:
    mounted = Path(f"{system.mountpoint}{directory}")
    (mounted / "sub").mkdir()
    (mounted / "sub" / "inner").write_bytes(b"12345")
    (mounted / "link").symlink_to("sub")
    (mounted / "line\nbreak").write_bytes(b"")
    assert ok(system, "ls", directory).splitlines() == ["line\\nbreak", "link@", "sub/"]
    long = ok(system, "ls", "-l", f"{directory}/sub")
    assert re.fullmatch(r"-rw\S+ +1 +\d+ +\d+ +5 \d{4}-\S+ \d\d:\d\d any +inner\n", long)
    assert ok(system, "tree", directory).splitlines() == [
        "line\\nbreak",
        "link@",
        "sub/",
        "  inner",
        "1 directories, 3 files, 8 B",
    ]


def test_names_are_changed_and_removed(system: Embedded, directory: str) -> None:
    mounted = Path(f"{system.mountpoint}{directory}")
    (mounted / "a").write_bytes(b"a")
    ok(system, "mv", f"{directory}/a", f"{directory}/b")
    ok(system, "mkdir", "-p", f"{directory}/deep/er")
    ok(system, "mkdir", "-p", f"{directory}/deep/er")
    ok(system, "mv", f"{directory}/b", f"{directory}/deep/er")
    assert (mounted / "deep" / "er" / "b").read_bytes() == b"a"
    (mounted / "c").write_bytes(b"c")
    moved = error(system, "mv", "--no-replace", f"{directory}/c", f"{directory}/deep/er/b")
    assert moved[0] == 1
    code, message = error(system, "rm", f"{directory}/deep")
    assert (code, message) == (1, f"{directory}/deep is a directory: -r removes it with all in it")
    for number in range(30):
        (mounted / "deep" / str(number)).write_bytes(b"")
    ok(system, "rm", "-r", f"{directory}/deep", f"{directory}/c")
    ok(system, "rm", "-f", f"{directory}/deep")
    assert os.listdir(mounted) == []
    code, message = error(system, "rm", f"{directory}/deep")
    assert (code, message) == (1, f"{directory}/deep: no such file or directory")


def test_errors_name_the_path(system: Embedded, directory: str) -> None:
    (Path(f"{system.mountpoint}{directory}") / "file").write_bytes(b"")
    none = f"{directory}/none"
    assert error(system, "ls", none) == (1, f"{none}: no such file or directory")
    assert error(system, "get", none, "-") == (1, f"{none}: no such file or directory")
    assert error(system, "put", "/no/such", none)[1] == "/no/such: No such file or directory"
    assert error(system, "mkdir", directory) == (1, f"{directory}: exists already")
    assert error(system, "ls", f"{directory}/file/x")[1].endswith("is not a directory")
    assert error(system, "put", "--no-replace", "/dev/null", f"{directory}/file") == (
        1,
        f"{directory}/file: exists already",
    )
    code, message = error(system, "get", directory, "-")
    assert (code, message) == (1, f"{directory} is a directory: name a file in it")


def test_a_multifile_is_got_as_one_stream(system: Embedded, directory: str) -> None:
    ok(system, "mkdir", "--kind", "multifile", f"{directory}/parts")
    for name in ("b", "a", "c"):
        Path(f"{system.mountpoint}{directory}/parts/{name}").write_text(name * 3)
    assert ok(system, "get", f"{directory}/parts", "-") == "aaabbbccc"


def test_classes_decide_the_tier(system: Embedded, directory: str) -> None:
    ok(system, "setclass", directory, "disk")
    assert '"storage_class": "disk"' in ok(system, "stat", "--json", directory)
    assert os.getxattr(f"{system.mountpoint}{directory}", "user.crail.storage_class") == b"disk"
    before = {tier["tier"]: tier["used_bytes"] for tier in system.status()["tiers"]}
    Path(f"{system.mountpoint}{directory}/x").write_bytes(b"x" * 2_000_000)
    after = {tier["tier"]: tier["used_bytes"] for tier in system.status()["tiers"]}
    assert after["disk"] - before["disk"] >= 2_000_000
    code, message = error(system, "setclass", directory, "gold")
    assert code == 1
    assert message.startswith("storage class 'gold': expected 'any', a tier (pmem, memory, nvme, d")


def test_tables_and_their_values(system: Embedded, directory: str) -> None:
    table = f"{directory}/settings"
    ok(system, "mkdir", "--kind", "table", table)
    ok(system, "kv", "put", table, "answer", "41")
    ok(system, "kv", "put", table, "answer", "42")
    ok(system, "kv", "put", table, "empty", "")
    assert ok(system, "kv", "get", table, "answer") == "42"
    assert ok(system, "kv", "ls", table).split() == ["2", "answer", "0", "empty"]
    ok(system, "kv", "rm", table, "empty")
    assert error(system, "kv", "get", table, "empty") == (1, f"{table} has no key empty")
    assert error(system, "kv", "put", directory, "k", "v")[1].startswith(f"{directory} is no table")


def test_df(system: Embedded) -> None:
    lines = ok(system, "df").splitlines()
    assert [line.split()[0] for line in lines] == ["tier", "memory", "disk", "all"]


def test_fsck_reads_the_data_and_finds_what_is_wrong(system: Embedded, directory: str) -> None:
    at = ("--at", str(system.mountpoint))
    file = Path(f"{system.mountpoint}{directory}/precious")
    ok(system, "setclass", directory, "disk")
    marker = os.urandom(1000) * 50
    file.write_bytes(marker)
    good = system.crail("fsck", "--data", *at)
    assert good.returncode == 0, good.stdout + good.stderr
    assert "nothing found" in good.stdout
    with system.state.disk_region.open("rb+") as region:
        content = region.read()
        region.seek(content.index(marker) + 20_000)
        region.write(b"!")
    bad = system.crail("fsck", "--data", *at)
    assert bad.returncode == 6, bad.stdout
    assert f"{directory}/precious: " in bad.stdout
    assert "1 findings" in bad.stdout
    file.unlink()
    assert system.crail("fsck", "--data", *at).returncode == 0


def test_a_second_mount_in_the_foreground(system: Embedded, tmp_path: Path) -> None:
    mountpoint = tmp_path / "second"
    mountpoint.mkdir()
    arguments = ["mount", str(mountpoint), "--config", str(system.state.config_file)]
    with ServerProcess(arguments, tmp_path / "log", environment=system.environment) as process:
        assert process.addresses == [str(mountpoint)]
        (system.mountpoint / "seen").write_bytes(b"by both")
        assert (mountpoint / "seen").read_bytes() == b"by both"
        assert system.crail("umount", str(mountpoint)).returncode == 0
        assert process.process.wait(10) == 0
    again = system.crail("umount", str(mountpoint))
    assert (again.returncode, again.stderr) == (
        3,
        f"crail umount: no CrailFS is mounted at {mountpoint}\n",
    )


def test_a_server_has_descriptors_for_all_connections(system: Embedded, tmp_path: Path) -> None:
    """Whatever soft limit the shell that started it had."""
    mountpoint = tmp_path / "second"
    mountpoint.mkdir()
    arguments = ["mount", str(mountpoint), "--config", str(system.state.config_file)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
    try:
        process = ServerProcess(arguments, tmp_path / "log", environment=system.environment)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    with process:
        raised, _ = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
    assert raised == (5_120 if hard == resource.RLIM_INFINITY else min(hard, 5_120))


def test_another_user_cannot_read_the_secret(system: Embedded) -> None:
    # Not in the test's own directory, into which other users cannot look.
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        directory.chmod(0o755)
        secret, config = directory / "secret", directory / "crail.toml"
        secret.write_text("a secret that is long enough")
        secret.chmod(0o600)
        config.write_text('[cluster]\nsecret_file = "secret"\nmetadata = "127.0.0.1:1"\n')
        done = run_crail(
            "status", "--config", str(config), environment=system.environment, user=NOBODY
        )
    assert done.returncode == 2, done.stderr
    assert f"cannot read the secret file {secret}: Permission denied" in done.stderr


def test_nobody_listens(system: Embedded) -> None:
    started = time.monotonic()
    done = system.crail(
        "status", "--config", str(system.state.config_file),
        "--set", f"cluster.metadata=unix:{system.directory}/none.sock",
        "--set", "client.operation_timeout_ms=500",
    )  # fmt: skip
    assert done.returncode == 3
    assert f"{system.directory}/none.sock" in done.stderr
    assert 0.5 < time.monotonic() - started < 5


@pytest.mark.parametrize("name", [name for name in SUBCOMMANDS if name != "bench"])
def test_each_command_has_help_with_examples(name: str) -> None:
    done = run_crail(name, "--help")
    assert done.returncode == 0
    assert f"  crail {name}" in done.stdout.partition("examples:")[2]


def test_help_is_quick() -> None:
    def seconds() -> float:
        started = time.monotonic()
        assert run_crail("--help").returncode == 0
        return time.monotonic() - started

    assert min(seconds() for _ in range(5)) < 0.15
    code = "import sys; from crailfs.cli.main import main; main(['staus']); print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=20
    ).stdout.split()
    assert not {"trio", "msgspec", "pyfuse3", "lmdb"} & set(loaded)


def test_a_wrong_command_line() -> None:
    done = run_crail("staus")
    assert done.returncode == 2
    assert done.stderr == "crail: there is no command 'staus': did you mean 'status'?\n"
    assert run_crail().returncode == 2
    assert run_crail("down").returncode == 2
    assert run_crail("fs", "lss").returncode == 2
