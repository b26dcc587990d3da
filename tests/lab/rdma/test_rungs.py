"""How writes become durable: each way is really taken, and nothing else says that it is durable."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from crailfs.records import Tier
from crailfs.transports import connect
from crailfs.transports.rdma import PIECE_BYTES
from crailfs.units import KIB, MIB
from crailfs.wire.messages import FlushRung
from tests.lab.rdma.cluster import Lab, lab_running, wipe
from tests.storage.cluster import client_config

WRITES = 5


async def write_some(lab: Lab, transport_name: str, tier: Tier) -> tuple[bool, dict[str, int]]:
    """Whether ``flush`` says durable, and what the client counted for ``WRITES`` writes."""
    config = client_config(lab.metadata, transport_name, timeout_ms=20_000)
    transport = await connect(lab.metadata.server, config, 42, lab.nursery)
    counters = getattr(transport, "counters", {})
    before = dict(counters)
    region = lab.metadata.region_id(tier)
    for index in range(WRITES):
        data = bytes([index + 1]) * MIB
        await transport.write(region, index * MIB, 1, data)
        assert bytes(await transport.read(region, index * MIB, MIB)) == data
    durable = await transport.flush(region)
    return durable, {name: counters[name] - before.get(name, 0) for name in counters}


async def test_rdma_flush_makes_persistent_memory_durable_without_the_server(
    tmp_path: Path, rdma_device: str, devdax: Path
) -> None:
    wipe(devdax)
    async with lab_running(tmp_path, {Tier.PMEM: devdax}) as lab:
        durable, counted = await write_some(lab, "rdma", Tier.PMEM)
        assert durable
        assert counted["writes"] == counted["flushes"] == WRITES
        assert counted["reads"] == WRITES, "those of the test itself"
        assert "flush_requests" not in counted
        status = await lab.status()
        assert not {"writes", "reads", "flushes", "range_flushes"} & status.counters.keys()
        (client,) = status.clients
        assert (client.client_id, client.transport) == (42, "rdma")
        assert client.rung == FlushRung.RDMA_FLUSH


async def test_where_rdma_flush_is_not_wanted_the_server_flushes_what_a_read_has_seen(
    tmp_path: Path, rdma_device: str, devdax: Path
) -> None:
    wipe(devdax)
    async with lab_running(tmp_path, {Tier.PMEM: devdax}, rdma_flush=False) as lab:
        durable, counted = await write_some(lab, "rdma", Tier.PMEM)
        assert durable
        assert counted["writes"] == counted["flush_requests"] == WRITES
        assert counted["reads"] == 2 * WRITES, "one behind each write, one of the test itself"
        assert "flushes" not in counted
        status = await lab.status()
        assert status.counters["range_flushes"] == WRITES
        assert "writes" not in status.counters
        assert status.clients[0].rung == FlushRung.READ_AND_REQUEST


@pytest.mark.parametrize("rdma_flush", [True, False], ids=["flush", "request"])
async def test_persistent_memory_takes_writes_of_any_size(
    tmp_path: Path, rdma_device: str, devdax: Path, rdma_flush: bool
) -> None:
    noise = random.Random(1)
    wipe(devdax)
    async with lab_running(tmp_path, {Tier.PMEM: devdax}, rdma_flush=rdma_flush) as lab:
        region = lab.metadata.region_id(Tier.PMEM)
        transport = await lab.transport()
        for size in (1, 4 * KIB + 1, PIECE_BYTES, 2 * PIECE_BYTES + 5):
            data, offset = noise.randbytes(size), noise.randrange(64 * MIB)
            await transport.write(region, offset, 1, data)
            assert bytes(await transport.read(region, offset, size)) == data
        assert transport.counters["writes"] == 6
        assert transport.counters["copied_bytes"] == transport.counters["written_bytes"]


async def test_over_tcp_the_server_writes_and_flushes(
    tmp_path: Path, rdma_device: str, devdax: Path
) -> None:
    wipe(devdax)
    async with lab_running(tmp_path, {Tier.PMEM: devdax}) as lab:
        durable, _ = await write_some(lab, "tcp", Tier.PMEM)
        assert durable
        status = await lab.status()
        assert status.counters["writes"] == WRITES
        assert (status.clients[0].transport, status.clients[0].rung) == ("tcp", FlushRung.TCP)


async def test_memory_is_never_durable(tmp_path: Path, rdma_device: str) -> None:
    async with lab_running(tmp_path, {Tier.MEMORY: tmp_path / "memory"}) as lab:
        durable, counted = await write_some(lab, "rdma", Tier.MEMORY)
        assert not durable
        assert counted["writes"] == WRITES
        assert "flushes" not in counted
        assert "flush_requests" not in counted


async def test_a_stand_in_for_persistent_memory_is_never_durable(
    tmp_path: Path, rdma_device: str
) -> None:
    async with lab_running(tmp_path, {Tier.PMEM: tmp_path / "pmem"}) as lab:
        durable, counted = await write_some(lab, "rdma", Tier.PMEM)
        assert not durable
        assert counted["writes"] == WRITES
        assert "flushes" not in counted


async def test_memory_that_the_device_cannot_reach_goes_over_the_control_connection(
    tmp_path: Path, rdma_device: str, fsdax: Path
) -> None:
    regions = {Tier.PMEM: fsdax / "region", Tier.MEMORY: tmp_path / "memory"}
    async with lab_running(tmp_path, regions) as lab:
        durable, counted = await write_some(lab, "rdma", Tier.PMEM)
        assert durable
        assert counted["tcp_operations"] == 2 * WRITES, "as many reads"
        status = await lab.status()
        assert status.counters["writes"] == WRITES
        assert "queue_pairs_destroyed" not in status.counters
