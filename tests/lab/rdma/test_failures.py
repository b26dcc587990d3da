"""Queue pairs that break, servers that go away and come back: no bytes lost, nothing waits long."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec
import pytest
import trio

from crailfs.errors import InvalidError, UnavailableError
from crailfs.records import Tier
from crailfs.transports.rdma import RETRY_RDMA_AFTER_S, RdmaTransport
from crailfs.units import MIB
from crailfs.wire.messages import ConnectQueuePair, Opcode, QueuePairEnd
from tests.lab.rdma.cluster import Lab, lab_config, lab_running
from tests.storage.cluster import REGION_SIZE, FakeMetadata, StorageProcess


def break_keys(transport: RdmaTransport) -> None:
    """The next operation on this queue pair is one that the server's device refuses."""
    regions = transport._regions
    for region_id, region in regions.items():
        regions[region_id] = msgspec.structs.replace(region, key=region.key ^ 0x5A5A00)


async def test_an_operation_whose_queue_pair_breaks_is_done_again_on_a_new_one(
    tmp_path: Path, rdma_device: str
) -> None:
    async with lab_running(tmp_path, {Tier.MEMORY: tmp_path / "memory"}) as lab:
        region = lab.metadata.region_id(Tier.MEMORY)
        transport = await lab.transport()
        break_keys(transport)
        await transport.write(region, 0, 1, b"w" * MIB)
        assert transport.counters["queue_pairs"] == 2
        break_keys(transport)
        assert bytes(await transport.read(region, 0, MIB)) == b"w" * MIB
        assert transport.counters["queue_pairs"] == 3
        assert (await lab.status()).counters["queue_pairs_destroyed"] == 2


async def test_all_that_was_under_way_on_a_broken_queue_pair_is_done_again(
    tmp_path: Path, rdma_device: str
) -> None:
    async with lab_running(tmp_path, {Tier.MEMORY: tmp_path / "memory"}) as lab:
        region = lab.metadata.region_id(Tier.MEMORY)
        transport = await lab.transport()
        count = REGION_SIZE // MIB

        async def write(index: int) -> None:
            await transport.write(region, index * MIB, 1, bytes([index + 1]) * MIB)

        async with trio.open_nursery() as nursery:
            for index in range(count):
                nursery.start_soon(write, index)
            while transport._link is not None and not transport._link._posted:
                await trio.lowlevel.checkpoint()
            break_keys(transport)
            nursery.start_soon(write, count - 1)
        for index in range(count):
            assert bytes(await transport.read(region, index * MIB, MIB)) == bytes([index + 1]) * MIB
        assert transport.counters["queue_pairs"] == 2


async def test_a_server_that_is_killed_and_comes_back_is_reached_by_rdma_again(
    tmp_path: Path, rdma_device: str
) -> None:
    async with FakeMetadata().running(tmp_path) as metadata, trio.open_nursery() as nursery:
        config = lab_config(tmp_path, metadata, {Tier.MEMORY: tmp_path / "memory"})
        # The same port again: the transport has nobody to ask.
        server = StorageProcess(config, tmp_path)
        await server.start(metadata)
        port = metadata.server.tcp_port
        fixed = msgspec.structs.replace(config, listen=(config.listen[0], f"127.0.0.1:{port}"))
        again = StorageProcess(fixed, tmp_path)
        lab = Lab(metadata, nursery)
        try:
            region = metadata.region_id(Tier.MEMORY)
            transport = await lab.transport(timeout_ms=60_000)
            await transport.write(region, 0, 1, b"before" * 1000)
            server.kill()

            async def write() -> None:
                await transport.write(region, MIB, 1, b"after" * 1000)

            async with trio.open_nursery() as writing:
                writing.start_soon(write)
                await again.start(metadata)
            assert bytes(await transport.read(region, 0, 6000)) == b"before" * 1000
            assert bytes(await transport.read(region, MIB, 5000)) == b"after" * 1000
            with trio.fail_after(2 * RETRY_RDMA_AFTER_S):
                while transport.counters["queue_pairs"] < 2:
                    await trio.sleep(0.5)
                    await transport.read(region, 0, 1)
            await transport.close()
        finally:
            server.kill()
            again.kill()


async def test_a_peer_that_answers_nothing_is_noticed_within_five_seconds(
    tmp_path: Path, rdma_device: str
) -> None:
    """Its queue pair is gone, and nobody said so."""
    async with lab_running(tmp_path, {Tier.MEMORY: tmp_path / "memory"}) as lab:
        region = lab.metadata.region_id(Tier.MEMORY)
        transport, rival = await lab.transport(), await lab.transport()  # of one client id
        assert [client.transport for client in (await lab.status()).clients] == ["rdma"] * 2
        started_s = time.monotonic()
        await transport.write(region, 0, 1, b"late" * 1000)
        assert time.monotonic() - started_s < 5
        assert transport.counters["queue_pairs"] == 2
        assert bytes(await rival.read(region, 0, 4000)) == b"late" * 1000


@pytest.mark.parametrize(
    "change",
    [
        {"gid": b""},
        {"gid": bytes(16)},
        {"number": 1 << 24},
        {"number": -1},
        {"packet_sequence": 1 << 24},
        {"mtu": 0},
        {"mtu": 6},
        {"reads_max": 256},
    ],
    ids=str,
)
async def test_a_server_refuses_ends_that_cannot_be(
    tmp_path: Path, rdma_device: str, change: dict[str, object]
) -> None:
    end = QueuePairEnd(
        gid=bytes(15) + b"\1", number=17, packet_sequence=0, mtu=3, can_flush=False, reads_max=0
    )
    async with lab_running(tmp_path, {Tier.MEMORY: tmp_path / "memory"}) as lab:
        transport = await lab.transport()
        request = ConnectQueuePair(msgspec.structs.replace(end, **change))
        with pytest.raises(InvalidError):
            await transport._tcp.call(Opcode.CONNECT_QUEUE_PAIR, request)


async def test_a_closed_transport_ends_what_is_under_way(tmp_path: Path, rdma_device: str) -> None:
    async with lab_running(tmp_path, {Tier.MEMORY: tmp_path / "memory"}) as lab:
        region = lab.metadata.region_id(Tier.MEMORY)
        transport = await lab.transport()
        failures = []

        async def write(index: int) -> None:
            try:
                await transport.write(region, index * MIB, 1, b"z" * MIB)
            except UnavailableError:
                failures.append(index)

        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                for index in range(16):
                    nursery.start_soon(write, index)
                while transport._link is not None and not transport._link._posted:
                    await trio.lowlevel.checkpoint()
                await transport.close()
        assert failures
