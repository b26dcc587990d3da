"""The storage server as its peers see it."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing
from msgspec.structs import replace

from crailfs.config import StorageConfig
from crailfs.errors import (
    AuthenticationError,
    BusyError,
    ConfigurationError,
    DamagedError,
    FencedError,
    InvalidError,
    NotSupportedError,
)
from crailfs.limits import PAYLOAD_MAX_BYTES
from crailfs.net.client import RpcClient
from crailfs.records import Tier
from crailfs.transports import Transport, connect
from crailfs.units import MIB
from crailfs.wire.messages import (
    AttachRegions,
    Message,
    Opcode,
    ReadBlocks,
    Role,
    StorageStatus,
    StorageStatusReply,
    WriteBlocks,
)
from storage_server import buffers
from storage_server import region as region_module
from storage_server.server import serve
from tests.storage.cluster import (
    BLOCK,
    CREDENTIALS,
    REGION_SIZE,
    FakeMetadata,
    StorageProcess,
    client_config,
    storage_config,
    storage_running,
)

CLIENT = 42


@contextlib.asynccontextmanager
async def cluster(directory: Path) -> AsyncIterator[tuple[FakeMetadata, StorageConfig]]:
    async with FakeMetadata().running(directory) as metadata:
        config = storage_config(directory, metadata)
        async with storage_running(config, metadata):
            yield metadata, config


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every write to a disk goes to a thread, as if the device had fallen behind."""
    monkeypatch.setattr("storage_server.media.disk.DiskMedium.try_write", lambda *_: False)


@contextlib.asynccontextmanager
async def client_of(
    metadata: FakeMetadata,
    *,
    role: Role = Role.CLIENT,
    client_id: int = CLIENT,
    local: bool = False,
) -> AsyncIterator[RpcClient]:
    server = metadata.server
    address = f"unix:{server.unix_path}" if local else f"{server.tcp_host}:{server.tcp_port}"
    client = RpcClient(address, CREDENTIALS, role=role, client_id=client_id)
    async with trio.open_nursery() as nursery:
        await nursery.start(client.run)
        yield client
        nursery.cancel_scope.cancel()


@contextlib.asynccontextmanager
async def attached(
    metadata: FakeMetadata, name: str, client_id: int = CLIENT
) -> AsyncIterator[Transport]:
    async with trio.open_nursery() as nursery:
        transport = await connect(
            metadata.server, client_config(metadata, name), client_id, nursery
        )
        yield transport
        await transport.close()


async def fails_to_start(config: StorageConfig, kind: type[Exception], match: str) -> None:
    async with trio.open_nursery() as nursery:
        with pytest.raises(kind, match=match), trio.fail_after(10):
            await nursery.start(partial(serve, config))
        nursery.cancel_scope.cancel()


# --- membership ---------------------------------------------------------------------------------


async def test_registers_what_it_has(tmp_path: Path) -> None:
    async with cluster(tmp_path) as (metadata, config):
        server = metadata.server
        assert server.host == "testhost"
        assert server.unix_path == str(tmp_path / "storage.sock")
        assert server.tcp_host == "127.0.0.1" and server.tcp_port > 0
        infos = [placed.info for placed in metadata.regions.values()]
        assert [(info.tier, info.durable) for info in infos] == [
            (Tier.MEMORY, False),
            (Tier.DISK, True),
        ]
        assert {info.block_count for info in infos} == {REGION_SIZE // BLOCK}
        assert [info.label for info in infos] == [str(region.path) for region in config.regions]


async def test_registers_again_when_the_metadata_server_does_not_know_it(tmp_path: Path) -> None:
    async with cluster(tmp_path) as (metadata, _):
        metadata.known = False
        await metadata.wait_registered(2)
        await metadata.wait_for(lambda heartbeat: True)
        assert len(metadata.regions) == 2


async def test_outlives_a_restart_of_the_metadata_server(tmp_path: Path) -> None:
    first = FakeMetadata()
    async with trio.open_nursery() as nursery:
        async with first.running(tmp_path):
            config = storage_config(tmp_path, first)
            await nursery.start(partial(serve, config))
        second = FakeMetadata()
        second.known = False
        second.regions = dict(first.regions)
        async with second.running(tmp_path):
            await second.wait_registered(1)
            assert second.servers == first.servers
            assert second.regions == first.regions
            nursery.cancel_scope.cancel()


async def test_waits_for_a_metadata_server_that_is_not_there_yet(tmp_path: Path) -> None:
    metadata = FakeMetadata()
    metadata.address = f"unix:{tmp_path}/metadata.sock"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(serve, storage_config(tmp_path, metadata)))
        await trio.testing.wait_all_tasks_blocked()
        async with metadata.running(tmp_path):
            await metadata.wait_for(lambda heartbeat: True)
            nursery.cancel_scope.cancel()


async def test_a_wrong_secret_ends_the_start(tmp_path: Path) -> None:
    async with FakeMetadata().running(tmp_path) as metadata:
        config = storage_config(tmp_path, metadata)
        wrong = replace(config, credentials=replace(CREDENTIALS, secret=b"not the right secret"))
        await fails_to_start(wrong, AuthenticationError, "secret")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"listen": ()}, "listens on"),
        ({"listen": ("unix:/a", "unix:/b")}, "at most one unix"),
        ({"listen": ("127.0.0.1:0", "127.0.0.1:0")}, "at most one host"),
        ({"regions": ()}, "0 regions"),
    ],
)
async def test_settings_that_cannot_be_are_refused(
    tmp_path: Path, change: dict[str, object], match: str
) -> None:
    metadata = FakeMetadata()
    metadata.address = "unix:/nowhere"
    config = replace(storage_config(tmp_path, metadata), **change)
    await fails_to_start(config, ConfigurationError, match)


async def test_two_regions_in_one_file_are_refused(tmp_path: Path) -> None:
    metadata = FakeMetadata()
    metadata.address = "unix:/nowhere"
    config = storage_config(tmp_path, metadata, [Tier.DISK, Tier.DISK])
    await fails_to_start(config, ConfigurationError, "same path")


# --- restarts -----------------------------------------------------------------------------------


async def test_keeps_regions_and_bytes_over_a_clean_restart(tmp_path: Path) -> None:
    async with FakeMetadata().running(tmp_path) as metadata:
        config = storage_config(tmp_path, metadata)
        for start in range(3):
            async with storage_running(config, metadata), attached(metadata, "tcp") as transport:
                for tier in (Tier.MEMORY, Tier.DISK):
                    region = metadata.region_id(tier)
                    for earlier in range(start):
                        found = await transport.read(region, earlier * BLOCK, 4)
                        assert bytes(found) == b"kep%d" % earlier
                    await transport.write(region, start * BLOCK, 1, b"kep%d" % start)
        assert len(metadata.servers) == 1
        assert len(metadata.regions) == 2


@pytest.mark.timeout(60)
async def test_keeps_regions_and_bytes_when_killed(tmp_path: Path) -> None:
    noise = random.Random(2)
    async with FakeMetadata().running(tmp_path) as metadata:
        process = StorageProcess(storage_config(tmp_path, metadata), tmp_path)
        try:
            await process.start(metadata)
            regions = [metadata.region_id(tier) for tier in (Tier.MEMORY, Tier.DISK)]
            data = noise.randbytes(3 * BLOCK)
            async with attached(metadata, "tcp", 1) as tcp, attached(metadata, "local", 2) as local:
                for region in regions:
                    await tcp.write(region, 0, 1, data)
                    await local.write(region, 4 * BLOCK, 1, data)
                process.kill()
                for region in regions:
                    # The local transport needs no server to go on.
                    assert bytes(await local.read(region, 0, len(data))) == data
                    await local.write(region, 8 * BLOCK, 1, data)
                    await local.flush(region)
                await process.start(metadata)
                for region in regions:
                    for offset in (0, 4 * BLOCK, 8 * BLOCK):
                        assert bytes(await local.read(region, offset, len(data))) == data
            async with attached(metadata, "tcp", 3) as tcp:
                for region in regions:
                    for offset in (0, 4 * BLOCK, 8 * BLOCK):
                        assert bytes(await tcp.read(region, offset, len(data))) == data
            assert len(metadata.regions) == 2
        finally:
            process.kill()


async def test_a_vanished_memory_region_is_a_new_one(tmp_path: Path) -> None:
    async with FakeMetadata().running(tmp_path) as metadata:
        config = storage_config(tmp_path, metadata)
        async with storage_running(config, metadata):
            pass
        (tmp_path / "memory").unlink()
        async with storage_running(config, metadata):
            assert len(metadata.regions) == 3


async def test_a_vanished_disk_region_is_refused_until_it_is_given_up(tmp_path: Path) -> None:
    async with FakeMetadata().running(tmp_path) as metadata:
        config = storage_config(tmp_path, metadata)
        async with storage_running(config, metadata):
            pass
        (tmp_path / "disk").unlink()
        await fails_to_start(config, DamagedError, "is gone")
        async with storage_running(storage_config(tmp_path, metadata, [Tier.MEMORY]), metadata):
            pass
        async with storage_running(config, metadata):
            assert len(metadata.regions) == 3


async def test_a_second_server_on_the_same_state_is_refused(tmp_path: Path) -> None:
    async with cluster(tmp_path) as (_, config):
        await fails_to_start(config, BusyError, "another storage server runs")
        elsewhere = replace(config, state=tmp_path / "other")
        await fails_to_start(elsewhere, BusyError, "served by another process")


# --- fencing ------------------------------------------------------------------------------------


async def test_a_fenced_tcp_client_is_cut_off_for_good(tmp_path: Path) -> None:
    async with FakeMetadata().running(tmp_path) as metadata:
        config = storage_config(tmp_path, metadata)
        async with storage_running(config, metadata), attached(metadata, "tcp") as transport:
            region = metadata.region_id(Tier.MEMORY)
            await transport.write(region, 0, 1, b"before")
            metadata.fence = (CLIENT,)
            await metadata.wait_for(lambda heartbeat: heartbeat.fenced == (CLIENT,))
            with pytest.raises(FencedError, match="lost its session"):
                await transport.write(region, 0, 1, b"after")
            metadata.fence = ()
            await metadata.wait_for(lambda heartbeat: heartbeat.fenced == ())
        async with storage_running(config, metadata):
            async with client_of(metadata, client_id=CLIENT) as client:
                with pytest.raises(FencedError):
                    await client.call(Opcode.STORAGE_STATUS, StorageStatus())
            async with attached(metadata, "tcp", CLIENT + 1) as other:
                assert bytes(await other.read(region, 0, 6)) == b"before"


async def test_an_attached_client_is_fenced_when_it_lets_go(tmp_path: Path) -> None:
    async with cluster(tmp_path) as (metadata, _):
        async with attached(metadata, "local") as transport:
            metadata.fence = (CLIENT, 4711)
            await metadata.wait_for(lambda heartbeat: heartbeat.fenced == (4711,))
            await transport.write(metadata.region_id(Tier.MEMORY), 0, 1, b"still its own block")
            async with trio.open_nursery() as nursery:
                with pytest.raises(FencedError, match="lost its session"):
                    await connect(metadata.server, client_config(metadata), CLIENT, nursery)
        await metadata.wait_for(lambda heartbeat: heartbeat.fenced == (CLIENT, 4711))


@pytest.mark.timeout(60)
async def test_a_stopped_client_is_not_fenced_before_it_is_dead(tmp_path: Path) -> None:
    async with FakeMetadata().running(tmp_path) as metadata:
        config = storage_config(tmp_path, metadata)
        child: subprocess.Popen[bytes] | None = None
        try:
            async with storage_running(config, metadata):
                child = await trio.to_thread.run_sync(
                    start_attached_client, metadata.server.unix_path
                )
                child.send_signal(signal.SIGSTOP)
                metadata.fence = (CLIENT,)
                for _ in range(2):
                    heartbeat = await metadata.wait_for(lambda heartbeat: True)
                    assert heartbeat.fenced == ()
            # It is held by the kernel, not by the server: a restart forgets nothing.
            async with storage_running(config, metadata):
                heartbeat = await metadata.wait_for(lambda heartbeat: True)
                assert heartbeat.fenced == ()
                child.kill()
                await trio.to_thread.run_sync(child.wait)
                await metadata.wait_for(lambda heartbeat: heartbeat.fenced == (CLIENT,))
        finally:
            if child is not None:
                child.kill()
                child.communicate()


def start_attached_client(unix_path: str) -> subprocess.Popen[bytes]:
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.storage.attached_client", unix_path, str(CLIENT)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"attached\n"
    return child


@pytest.mark.parametrize("tier", [Tier.MEMORY, Tier.DISK])
async def test_a_write_under_an_old_generation_changes_nothing(tmp_path: Path, tier: Tier) -> None:
    async with cluster(tmp_path) as (metadata, _), attached(metadata, "tcp") as transport:
        region = metadata.region_id(tier)
        await transport.write(region, BLOCK, 6, b"n" * BLOCK)
        with pytest.raises(FencedError, match="generation 6"):
            await transport.write(region, 0, 5, b"o" * (2 * BLOCK))
        assert bytes(await transport.read(region, 0, 2 * BLOCK)) == bytes(BLOCK) + b"n" * BLOCK


# --- provisioning -------------------------------------------------------------------------------


async def test_memory_is_provisioned_ahead_of_what_is_handed_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(region_module, "PROVISION_MARGIN_BYTES", 16 * BLOCK)
    async with trio.open_nursery() as nursery, FakeMetadata().running(tmp_path) as metadata:
        config = storage_config(tmp_path, metadata, [Tier.MEMORY])
        await nursery.start(partial(serve, config))
        await metadata.wait_for(lambda heartbeat: heartbeat.regions[0].usable_blocks == 16)
        assert os.stat(tmp_path / "memory").st_blocks * 512 < 20 * BLOCK
        async with attached(metadata, "tcp") as transport:
            with pytest.raises(InvalidError, match="usable"):
                await transport.write(1, 16 * BLOCK, 1, b"x")
            metadata.high_water_blocks = 100
            await metadata.wait_for(lambda heartbeat: heartbeat.regions[0].usable_blocks == 116)
            await transport.write(1, 16 * BLOCK, 1, b"x")
        metadata.high_water_blocks = 250
        await metadata.wait_for(lambda heartbeat: heartbeat.regions[0].usable_blocks == 256)
        nursery.cancel_scope.cancel()


# --- bad input ----------------------------------------------------------------------------------

Refused = tuple[Opcode, Callable[[int], Message], bytes | None, type[Exception]]

REFUSED: list[Refused] = [
    (Opcode.READ_BLOCKS, lambda region: ReadBlocks(region, -1, 10), None, InvalidError),
    (Opcode.READ_BLOCKS, lambda region: ReadBlocks(region, 0, 0), None, InvalidError),
    (Opcode.READ_BLOCKS, lambda region: ReadBlocks(region, 0, -5), None, InvalidError),
    (Opcode.READ_BLOCKS, lambda region: ReadBlocks(region, REGION_SIZE, 1), None, InvalidError),
    (
        Opcode.READ_BLOCKS,
        lambda region: ReadBlocks(region, 0, PAYLOAD_MAX_BYTES + 1),
        None,
        InvalidError,
    ),
    (Opcode.WRITE_BLOCKS, lambda region: WriteBlocks(region, 0, 1), None, InvalidError),
    (Opcode.WRITE_BLOCKS, lambda region: WriteBlocks(region, -1, 1), b"x", InvalidError),
    (Opcode.WRITE_BLOCKS, lambda region: WriteBlocks(region, 0, 0), b"x", InvalidError),
    (Opcode.WRITE_BLOCKS, lambda region: WriteBlocks(region, REGION_SIZE, 1), b"x", InvalidError),
    (Opcode.ATTACH_REGIONS, lambda region: AttachRegions(CLIENT), None, NotSupportedError),
]


@pytest.mark.parametrize("tier", [Tier.MEMORY, Tier.DISK])
async def test_requests_that_cannot_be_are_refused_and_harm_nobody(
    tmp_path: Path, tier: Tier
) -> None:
    async with cluster(tmp_path) as (metadata, _), client_of(metadata) as client:
        region = metadata.region_id(tier)
        for opcode, make, payload, kind in REFUSED:
            with pytest.raises(kind):
                await client.call(opcode, make(region), payload=payload)
        await client.call(Opcode.WRITE_BLOCKS, WriteBlocks(region, 0, 1), payload=b"fine")
        found = bytearray(4)
        await client.call(Opcode.READ_BLOCKS, ReadBlocks(region, 0, 4), into=memoryview(found))
        assert found == b"fine"


async def test_nobody_attaches_as_somebody_else(tmp_path: Path) -> None:
    async with cluster(tmp_path) as (metadata, _), client_of(metadata, local=True) as client:
        with pytest.raises(InvalidError, match="cannot attach as"):
            await client.call_with_fds(Opcode.ATTACH_REGIONS, AttachRegions(CLIENT + 1))


async def test_servers_are_not_served(tmp_path: Path) -> None:
    async with (
        cluster(tmp_path) as (metadata, _),
        client_of(metadata, role=Role.STORAGE_SERVER) as client,
    ):
        with pytest.raises(AuthenticationError, match="serves clients"):
            await client.call(Opcode.STORAGE_STATUS, StorageStatus())


# --- devices ------------------------------------------------------------------------------------


async def test_counts_what_it_does(tmp_path: Path) -> None:
    async with cluster(tmp_path) as (metadata, _), client_of(metadata) as client:
        await client.call(Opcode.WRITE_BLOCKS, WriteBlocks(1, 0, 1), payload=b"12345")
        await client.call(Opcode.READ_BLOCKS, ReadBlocks(1, 0, 3), into=memoryview(bytearray(3)))
        status = await client.call(Opcode.STORAGE_STATUS, StorageStatus())
        assert isinstance(status, StorageStatusReply)
        expected = {"writes": 1, "written_bytes": 5, "reads": 1, "read_bytes": 3}
        assert {name: status.counters[name] for name in expected} == expected


@pytest.mark.usefixtures("slow_disk")
async def test_writers_that_a_disk_cannot_follow_are_put_off_not_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buffers, "BUFFERED_MAX_BYTES", 4 * MIB)
    async with cluster(tmp_path) as (metadata, _), trio.open_nursery() as nursery:
        region = metadata.region_id(Tier.DISK)
        done = trio.open_memory_channel[None](16)

        async def write(index: int) -> None:
            async with attached(metadata, "tcp", 100 + index) as transport:
                await transport.write(region, index * MIB, 1, bytes([index]) * MIB)
                assert bytes(await transport.read(region, index * MIB, MIB)) == bytes([index]) * MIB
                await done[0].send(None)

        for index in range(16):
            nursery.start_soon(write, index)
        with trio.fail_after(20):
            for _ in range(16):
                await done[1].receive()


@pytest.mark.usefixtures("slow_disk")
async def test_a_client_is_not_fenced_while_a_thread_writes_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, may_end = threading.Event(), threading.Event()

    def write(*_: object) -> None:
        started.set()
        assert may_end.wait(20)

    monkeypatch.setattr("storage_server.media.disk.write_all", write)
    async with cluster(tmp_path) as (metadata, _), attached(metadata, "tcp") as transport:
        region = metadata.region_id(Tier.DISK)

        async def cut_off() -> None:
            with pytest.raises(FencedError):
                await transport.write(region, 0, 1, b"x")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(cut_off)
            await trio.to_thread.run_sync(started.wait)
            metadata.fence = (CLIENT, 4711)
            heartbeat = await metadata.wait_for(lambda heartbeat: bool(heartbeat.fenced))
            assert heartbeat.fenced == (4711,)
            may_end.set()
            await metadata.wait_for(lambda heartbeat: heartbeat.fenced == (CLIENT, 4711))


@pytest.mark.parametrize("inline", [True, False])
async def test_a_failing_device_is_an_error_and_its_blocks_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inline: bool
) -> None:
    def fail_at_once(*_: object) -> bool:
        raise OSError(5, "Input/output error")

    async def fail(*_: object) -> bool:
        raise OSError(5, "Input/output error")

    async with cluster(tmp_path) as (metadata, _), attached(metadata, "tcp") as transport:
        region = metadata.region_id(Tier.DISK)
        medium = "storage_server.media.disk.DiskMedium"
        for operation in ("try_read", "try_write"):
            at_once = fail_at_once if inline else lambda *_: False
            monkeypatch.setattr(f"{medium}.{operation}", at_once)
        for operation in ("read", "write", "flush"):
            monkeypatch.setattr(f"{medium}.{operation}", fail)
        for call in (
            transport.write(region, 3 * BLOCK, 1, b"x" * (BLOCK + 1)),
            transport.read(region, 9 * BLOCK, 1),
            transport.flush(region),
        ):
            with pytest.raises(DamagedError, match="Input/output error"):
                await call
        heartbeat = await metadata.wait_for(lambda heartbeat: True)
        failed = {state.region_id: state.failed_blocks for state in heartbeat.regions}
        assert failed[region] == (3, 4, 9)
        memory = metadata.region_id(Tier.MEMORY)
        assert failed[memory] == ()
        await transport.write(memory, 0, 1, b"x" * MIB)
