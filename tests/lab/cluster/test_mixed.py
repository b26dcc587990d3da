"""Clients that reach the same files in different ways: by RDMA, over TCP, on the servers' host."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from crailfs.units import MIB
from tests.lab.rdma.load import content
from tests.lab.rdma.two_hosts import CRAIL, STATE, TwoHosts
from tests.model.machine import FileSystemModel

SEED = int(os.environ.get("CRAIL_TEST_SEED", "20261120"))
EXAMPLES = int(os.environ.get("CRAIL_TEST_LAB_MIXED_EXAMPLES", "4"))
STEPS = 50
TURNS = 9
FILE_BYTES = 3 * MIB + 17


class Way(Protocol):
    """One client, as the programs of its host see it."""

    def put(self, name: str, offset: int, seed: int, byte_count: int) -> None:
        """Write ``content`` into a file."""

    def sha256(self, name: str) -> str: ...


class Here:
    def __init__(self, mount: Path) -> None:
        self.mount = mount

    def put(self, name: str, offset: int, seed: int, byte_count: int) -> None:
        descriptor = os.open(self.mount / name, os.O_WRONLY | os.O_CREAT)
        try:
            assert os.pwrite(descriptor, content(seed, byte_count), offset) == byte_count
        finally:
            os.close(descriptor)

    def sha256(self, name: str) -> str:
        return hashlib.sha256((self.mount / name).read_bytes()).hexdigest()


class There:
    def __init__(self, cluster: TwoHosts, mountpoint: str) -> None:
        self.cluster = cluster
        self.mountpoint = mountpoint

    @classmethod
    @contextlib.contextmanager
    def mounted(cls, cluster: TwoHosts) -> Iterator[There]:
        mountpoint = f"{STATE}/mnt"
        cluster.peer.run(["mkdir", "-p", mountpoint])
        options = ["--config", f"{STATE}/crail.toml", "--set", "client.transports=local"]
        with cluster.peer.start(
            [*CRAIL, "mount", mountpoint, *options, "--ready-fd", "1"]
        ) as there:
            there.wait_for('"ready"', timeout_s=60)
            yield cls(cluster, mountpoint)
            there.signal(signal.SIGTERM)
            assert there.wait(60) == 0, there.output()

    def put(self, name: str, offset: int, seed: int, byte_count: int) -> None:
        self._run("put", name, str(offset), str(seed), str(byte_count))

    def sha256(self, name: str) -> str:
        return self._run("sum", name).strip()

    def _run(self, action: str, name: str, *arguments: str) -> str:
        command = ["python3", "-m", "tests.lab.cluster.there", action, f"{self.mountpoint}/{name}"]
        return self.cluster.peer.run([*command, *arguments])


@pytest.mark.timeout(200)
def test_each_reads_what_any_other_has_written(
    cluster: TwoHosts, rdma_mount: Path, tcp_mount: Path
) -> None:
    print(f"seed {SEED}")
    noise = random.Random(SEED)
    with There.mounted(cluster) as there:
        ways: dict[str, Way] = {"rdma": Here(rdma_mount), "tcp": Here(tcp_mount), "local": there}
        expected = bytearray()
        for turn in range(TURNS):
            name = list(ways)[turn % len(ways)]
            offset = noise.randrange(len(expected)) if expected else 0
            byte_count = noise.randrange(1, MIB) if expected else FILE_BYTES
            expected[offset : offset + byte_count] = content(turn, byte_count)
            ways[name].put("shared", offset, turn, byte_count)
            digest = hashlib.sha256(expected).hexdigest()
            for reader, way in ways.items():
                assert way.sha256("shared") == digest, f"turn {turn}: {reader} after {name}"
        # Both hosts at once, in blocks that they share: nobody's bytes undo another's.
        stripe = 10_000
        with cluster.peer.start(_stripes(there.mountpoint, stripe)) as elsewhere:
            for index in range(0, 30, 3):
                ways["rdma"].put("striped", index * stripe, index, stripe)
                ways["tcp"].put("striped", (index + 1) * stripe, index + 1, stripe)
            assert elsewhere.wait(60) == 0, elsewhere.output()
        striped = b"".join(content(index, stripe) for index in range(30))
        digest = hashlib.sha256(striped).hexdigest()
        assert {name: way.sha256("striped") for name, way in ways.items()} == dict.fromkeys(
            ways, digest
        )
        used = {client.transport for client in cluster.storage_status().clients}
        assert used == set(ways)
    cluster.audit()


def _stripes(mountpoint: str, stripe: int) -> list[str]:
    """Every third stripe, written on the other host."""
    script = (
        "import sys; from tests.lab.cluster.there import put; path, stripe = sys.argv[1:];"
        "[put(path, index * int(stripe), index, stripe) for index in range(2, 30, 3)]"
    )
    return ["python3", "-c", script, f"{mountpoint}/striped", str(stripe)]


@pytest.mark.timeout(400)
def test_mounts_by_rdma_and_tcp_behave_as_one_local_file_system(
    cluster: TwoHosts, rdma_mount: Path, tcp_mount: Path
) -> None:
    """Each step on the other mount: whatever one has done and closed, the other sees."""
    print(f"seed {SEED}, {EXAMPLES} examples of up to {STEPS} steps")
    before = cluster.storage_status().counters
    (rdma_mount / "model").mkdir()
    (rdma_mount / "model").chmod(0o755)
    base = tempfile.mkdtemp(prefix="crailfs-model-")
    os.chmod(base, 0o755)

    class Model(FileSystemModel):
        mount_roots = (f"{rdma_mount}/model", f"{tcp_mount}/model")
        local_root = base

        def teardown(self) -> None:
            super().teardown()
            cluster.audit()

    try:
        run_state_machine_as_test(
            seed(SEED)(Model),
            settings=settings(
                max_examples=EXAMPLES,
                stateful_step_count=STEPS,
                deadline=None,
                database=None,
                print_blob=True,
                phases=(Phase.generate,),
                suppress_health_check=list(HealthCheck),
            ),
        )
    finally:
        shutil.rmtree(base)
    status = cluster.storage_status()
    assert {client.transport for client in status.clients} == {"rdma", "tcp"}
    assert status.counters["writes"] > before.get("writes", 0)
