"""A client that lost its session writes nothing any more, whatever its device was told before."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from crailfs.errors import FencedError, UnavailableError
from crailfs.records import Tier
from crailfs.units import MIB
from tests.lab.rdma.cluster import lab_running, save
from tests.lab.rdma.straggler import FILLING, Orders
from tests.storage.cluster import REGION_SIZE, client_config

LATER = b"\x55"


async def test_a_stopped_client_with_writes_under_way_is_cut_off_and_finds_out_when_continued(
    tmp_path: Path, rdma_device: str
) -> None:
    async with lab_running(tmp_path, {Tier.MEMORY: tmp_path / "memory"}) as lab:
        region = lab.metadata.region_id(Tier.MEMORY)
        config = client_config(lab.metadata, "rdma", timeout_ms=10_000)
        save(Orders(lab.metadata.server, config, 42, region, REGION_SIZE), tmp_path / "orders")
        child = subprocess.Popen(  # noqa: ASYNC220  (waited for in threads)
            [sys.executable, "-m", "tests.lab.rdma.straggler", str(tmp_path / "orders")],
            stdout=subprocess.PIPE,
        )
        try:
            _, status = await trio.to_thread.run_sync(os.waitpid, child.pid, os.WUNTRACED)
            assert os.WIFSTOPPED(status), f"it ended with {status}"

            lab.metadata.fence = (42,)
            await lab.metadata.wait_for(lambda heartbeat: 42 in heartbeat.fenced)
            assert not (await lab.status()).clients
            # From here on its blocks are somebody else's.
            other = await lab.transport(client_id=43)
            for offset in range(0, REGION_SIZE, MIB):
                await other.write(region, offset, 2, LATER * MIB)

            child.send_signal(signal.SIGCONT)
            said, _ = await trio.to_thread.run_sync(child.communicate)
            print(said.decode())
            assert child.returncode == 0
            failed = int(said.decode().split()[1])
            assert failed > 0, "its device was done before it was stopped: nothing was tested"
            found = await other.read(region, 0, REGION_SIZE)
            assert bytes(found).count(FILLING) == 0
            assert bytes(found) == LATER * REGION_SIZE
        finally:
            child.kill()
            child.wait()


async def test_a_client_that_is_cut_off_gets_an_error_at_once(
    tmp_path: Path, rdma_device: str
) -> None:
    async with lab_running(tmp_path, {Tier.MEMORY: tmp_path / "memory"}) as lab:
        region = lab.metadata.region_id(Tier.MEMORY)
        transport = await lab.transport()
        await transport.write(region, 0, 1, b"x" * MIB)
        lab.metadata.fence = (42,)
        await lab.metadata.wait_for(lambda heartbeat: 42 in heartbeat.fenced)
        with trio.fail_after(10), pytest.raises((FencedError, UnavailableError)):
            await transport.write(region, 0, 1, b"y" * MIB)
        other = await lab.transport(client_id=43)
        assert bytes(await other.read(region, 0, MIB)) == b"x" * MIB


async def test_a_write_over_tcp_ends_the_queue_pair_before_its_bytes_arrive(
    tmp_path: Path, rdma_device: str
) -> None:
    """So a packet of an earlier attempt cannot undo it; the next operation has a new queue pair."""
    async with lab_running(tmp_path, {Tier.MEMORY: tmp_path / "memory"}) as lab:
        region = lab.metadata.region_id(Tier.MEMORY)
        transport = await lab.transport(timeout_ms=15_000)
        await transport._tcp.write(region, 0, 1, b"over tcp")
        status = await lab.status()
        assert status.counters["queue_pairs_destroyed"] == 1
        assert [client.transport for client in status.clients] == ["tcp"]
        assert bytes(await transport.read(region, 0, 8)) == b"over tcp"
        assert transport.counters["queue_pairs"] == 2
        assert [client.transport for client in (await lab.status()).clients] == ["rdma"]
