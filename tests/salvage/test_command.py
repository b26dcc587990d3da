"""The commands as an operator types them, on processes of their own."""

from __future__ import annotations

import contextlib
import json
import os
import random
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from crailfs.pmem import libpmem, libpmemobj
from tests.support.processes import ServerProcess, run_crail, wait_until

_without_pmem = libpmem.missing() or libpmemobj.missing()
needs_pmem = pytest.mark.skipif(_without_pmem is not None, reason=str(_without_pmem))
CLUSTER_ID = "00112233445566778899aabbccddeeff"
CONFIGURATION = """\
[cluster]
id = "{id}"
secret_file = "{state}/secret"
metadata = "unix:{state}/metadata.sock"

[metadata]
state = "{state}/metadata"
listen = ["unix:{state}/metadata.sock"]

[storage]
state = "{state}/storage"
listen = ["unix:{state}/storage.sock", "127.0.0.1:0"]

[[storage.region]]
tier = "{tier}"
path = "{region}"
size = 33554432
"""


class Commands:
    def __init__(self, state: Path, region: Path, tier: str) -> None:
        self.state = state
        self.configuration = state / "crail.toml"
        self.configuration.write_text(
            CONFIGURATION.format(id=CLUSTER_ID, state=state, region=region, tier=tier)
        )
        secret = state / "secret"
        secret.touch(0o600)
        secret.write_text(secrets.token_hex(32))
        self.servers: dict[str, ServerProcess] = {}

    def start(self, *names: str) -> None:
        for name in names:
            self.servers[name] = ServerProcess(
                [name, "--config", str(self.configuration)], self.state / f"{name}.log"
            )

    def kill(self) -> None:
        for server in self.servers.values():
            server.kill()
        self.servers.clear()

    def crail(self, *arguments: str) -> CompletedProcess[str]:
        return run_crail(*arguments, "--config", str(self.configuration), timeout_s=60)

    def ok(self, *arguments: str) -> str:
        done = self.crail(*arguments)
        assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
        return done.stdout

    def headers_waiting(self) -> int:
        waiting: int = json.loads(self.ok("status", "--json"))["counters"]["header_changes_waiting"]
        return waiting


@contextlib.contextmanager
def commands(state: Path, tier: str) -> Iterator[Commands]:
    with tempfile.TemporaryDirectory(prefix="crailfs-test-", dir="/dev/shm") as in_memory:
        region = Path(in_memory) / "region" if tier == "pmem" else state / "region"
        running = Commands(state, region, tier)
        try:
            running.start("metadata", "storage")
            yield running
        finally:
            running.kill()


@pytest.mark.parametrize("tier", ["nvme", pytest.param("pmem", marks=needs_pmem)])
def test_salvage_after_kill_and_loss(tmp_path: Path, tier: str) -> None:
    with commands(tmp_path, tier) as cluster:
        contents = {}
        for number, size in enumerate((10, 100_000, 3_000_000)):
            source = tmp_path / f"source-{number}"
            contents[size] = random.Random(number).randbytes(size)
            source.write_bytes(contents[size])
            cluster.ok("fs", "put", str(source), f"/file-{number}")
        wait_until(lambda: not cluster.headers_waiting(), "headers followed", timeout_s=20)
        assert cluster.ok("fsck", "--salvage") == "no region holds blocks of a lost name space\n"

        cluster.kill()
        shutil.rmtree(tmp_path / "metadata")
        cluster.start("metadata", "storage")
        assert "lost name space" in cluster.ok("status")
        done = cluster.crail("fsck", "--discard-unclaimed")
        assert done.returncode == 3 - 1 and "--yes-lose-the-data" in done.stderr
        said = cluster.ok("fsck", "--salvage")
        assert "salvaged into /lost+found: 3 files" in said
        assert "lost name space" not in cluster.ok("status")
        names = cluster.ok("fs", "ls", "/lost+found").split()
        files = [name for name in names if name.startswith("inode-")]
        assert len(files) == 3
        found = {}
        for name in files:
            target = tmp_path / name
            cluster.ok("fs", "get", f"/lost+found/{name}", str(target))
            found[os.path.getsize(target)] = target.read_bytes()
        assert found == contents
        assert "nothing found" in cluster.ok("fsck", "--data")


def test_options_that_do_not_go_together(tmp_path: Path) -> None:
    for options in (
        ["--salvage", "--data"],
        ["--salvage", "--discard-unclaimed"],
        ["--no-verify"],
        ["--discard-unclaimed"],
        ["--yes-lose-the-data"],
    ):
        done = run_crail("fsck", *options, "--config", str(tmp_path / "none"))
        assert done.returncode == 2, done.stderr
