"""The file system between two hosts, its bytes moved by RDMA into persistent memory."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from crailfs.client.store import CrailStore
from crailfs.transports.rdma import RdmaTransport
from crailfs.units import MIB
from crailfs.wire.messages import FlushRung
from tests.lab.peer import Peer
from tests.lab.rdma.load import Load, Outage, content
from tests.lab.rdma.two_hosts import TOO_NEAR, TwoHosts, two_hosts
from tests.model.machine import FileSystemModel

SEED = int(os.environ.get("CRAIL_TEST_SEED", "20261120"))
EXAMPLES = int(os.environ.get("CRAIL_TEST_LAB_MODEL_EXAMPLES", "8"))
STEPS = 50


@pytest.fixture(scope="module")
def cluster(peer: Peer, rdma_device: str, devdax: Path) -> Iterator[TwoHosts]:
    with (
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryDirectory(prefix="crailfs-lab-") as directory,
    ):
        patch.delenv(TOO_NEAR)
        os.chmod(directory, 0o755)
        with two_hosts(peer, Path(directory), devdax) as running:
            yield running


@pytest.mark.timeout(200)
async def test_what_a_mib_costs(cluster: TwoHosts, out: Path) -> None:
    """The figures of docs/design.md: verbs, completions, copies, and the server's part."""
    mib_count = 64
    pid = cluster.storage.pid
    async with CrailStore.connect(cluster.client_config("rdma")) as store:
        await store.write("/warm", b"x")
        (transport,) = store.filesystem.storage._by_server.values()
        assert isinstance(transport, RdmaTransport)
        counters = transport.counters
        costs = {}
        data = content(1, mib_count * MIB)

        async def write() -> None:
            async with await store.create("/costs") as file:
                for at in range(0, len(data), MIB):
                    await file.write(data[at : at + MIB])

        async def read() -> None:
            async with await store.open("/costs") as file:
                for at in range(0, len(data), MIB):
                    assert bytes(await file.read(MIB)) == data[at : at + MIB]

        async def idle() -> None:
            await trio.sleep(5)

        for name, work in (("written", write), ("read", read), ("idle", idle)):
            counters.clear()
            before = server_use(cluster.peer, pid)
            await work()
            after = server_use(cluster.peer, pid)
            costs[name] = {
                **counters,
                **{f"server_{key}": after[key] - before[key] for key in after},
            }
        report = json.dumps({"mib": mib_count, **costs}, indent=1, sort_keys=True)
        print(report)
        await trio.Path(out / "rdma_counts.json").write_text(report)


def server_use(peer: Peer, pid: int) -> dict[str, float]:
    """How often the process was woken, and how much processor time it had."""
    script = (
        "import sys, re; pid = sys.argv[1]; text = open(f'/proc/{pid}/status').read();"
        "stat = open(f'/proc/{pid}/stat').read().rpartition(')')[2].split();"
        "print(re.search(r'nonvoluntary_ctxt_switches:|voluntary_ctxt_switches:\\s+(\\d+)',"
        " text)[1], int(stat[11]) + int(stat[12]))"
    )
    wakeups, ticks = map(int, peer.python(script, str(pid)).split())
    return {"wakeups": wakeups, "cpu_ticks": ticks, "at_s": round(time.monotonic(), 1)}


@pytest.mark.timeout(500)
def test_the_mount_behaves_as_a_local_file_system(cluster: TwoHosts) -> None:
    # The steps' changes of user end this process' own use of RDMA: the kernel refuses an open
    # device to other credentials than it was opened with.
    print(f"seed {SEED}, {EXAMPLES} examples of up to {STEPS} steps")
    before = cluster.storage_status().counters
    base = Path(tempfile.mkdtemp(prefix="crailfs-model-"))
    base.chmod(0o755)
    (base / "mnt").mkdir()
    with cluster.mount(base / "mnt", "rdma"):

        class Model(FileSystemModel):
            mount_roots = (str(base / "mnt"),)
            local_root = tempfile.mkdtemp(dir=base)

            def teardown(self) -> None:
                super().teardown()
                cluster.audit()

        os.chmod(Model.local_root, 0o755)
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
        status = cluster.storage_status()
        assert [client.rung for client in status.clients] == [FlushRung.RDMA_FLUSH]
        for counter in ("writes", "reads", "flushes", "range_flushes"):
            assert status.counters.get(counter, 0) == before.get(counter, 0), "the server took part"


@pytest.mark.timeout(300)
def test_without_rdma_packets_tcp_takes_over_and_later_rdma_again(
    cluster: TwoHosts, tmp_path: Path, nic: str
) -> None:
    with (
        cluster.mount(tmp_path / "mnt", "rdma", "tcp"),
        Load(tmp_path / "mnt" / "dropped") as load,
    ):
        load.wait_for(3)
        before = cluster.storage_status().counters
        with Outage(nic).without_rdma():
            reached = load.done
            load.wait_for(reached + 4)
            during = cluster.storage_status()
            assert during.counters["writes"] > before.get("writes", 0), "they came over TCP"
        print(f"{load}")
        # Noticed within 5 s, a new queue pair found to be no better within 5 s, and then TCP.
        assert load.longest_s < 15
        deadline_s = time.monotonic() + 30
        while all(client.transport != "rdma" for client in cluster.storage_status().clients):
            assert time.monotonic() < deadline_s, "it stays with TCP"
            time.sleep(0.5)
        load.wait_for(load.done + 2)
        load.check()


@pytest.mark.timeout(300)
def test_a_link_that_goes_down_and_up_loses_nothing(
    cluster: TwoHosts, tmp_path: Path, nic: str
) -> None:
    with (
        cluster.mount(tmp_path / "mnt", "rdma", "tcp"),
        Load(tmp_path / "mnt" / "down") as load,
    ):
        load.wait_for(3)
        Outage(nic).link_down_for(4)
        reached = load.done
        load.wait_for(reached + 4)
        print(f"{load}")
        load.check()
    cluster.audit()
