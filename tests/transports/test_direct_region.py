"""Clients of the same host that use a device themselves: failing blocks, and their end."""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest
import trio

from crailfs.errors import (
    CrailError,
    DamagedError,
    InvalidError,
    NotPermittedError,
    UnavailableError,
)
from crailfs.net.client import RpcClient
from crailfs.pmem import libpmemobj
from crailfs.records import Tier
from crailfs.transports import Transport, connect, persistent_region
from crailfs.transports.local import LocalTransport
from crailfs.wire.messages import (
    Message,
    Opcode,
    ReportFailed,
    Role,
    StorageStatus,
    StorageStatusReply,
)
from storage_server.fencing import Fencing
from tests.storage.cluster import (
    BLOCK,
    CREDENTIALS,
    REGION_SIZE,
    FakeMetadata,
    client_config,
    storage_config,
    storage_running,
)

CLIENT = 42
BLOCKS = REGION_SIZE // BLOCK


class Attached(NamedTuple):
    metadata: FakeMetadata
    transport: Transport
    region: int
    file: Path

    @property
    def data_offset(self) -> int:
        return self.file.stat().st_size - REGION_SIZE

    async def failed_blocks(self) -> tuple[int, ...]:
        """As the storage server reports them next."""
        heartbeat = await self.metadata.wait_for(lambda _: True)
        (state,) = (state for state in heartbeat.regions if state.region_id == self.region)
        return state.failed_blocks

    async def device_errors(self) -> int:
        status = await self.ask(Opcode.STORAGE_STATUS, StorageStatus())
        assert isinstance(status, StorageStatusReply)
        return status.counters.get("device_errors", 0)

    async def ask(self, opcode: Opcode, request: Message, address: str = "") -> Message:
        """Over the Unix socket if no ``address`` is given."""
        address = address or f"unix:{self.metadata.server.unix_path}"
        client = RpcClient(address, CREDENTIALS, role=Role.CLIENT, client_id=7)
        failure: CrailError | None = None
        async with trio.open_nursery() as nursery:
            await nursery.start(client.run)
            try:
                answer = await client.call(opcode, request)
            except CrailError as error:
                failure = error
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure
        return answer


@contextlib.asynccontextmanager
async def attached(directory: Path, name: str = "local") -> AsyncIterator[Attached]:
    async with FakeMetadata().running(directory) as metadata:
        config = storage_config(directory, metadata, (Tier.NVME,))
        async with storage_running(config, metadata), trio.open_nursery() as nursery:
            transport = await connect(
                metadata.server, client_config(metadata, name), CLIENT, nursery
            )
            region = metadata.region_id(Tier.NVME)
            yield Attached(metadata, transport, region, directory / "nvme")
            await transport.close()


@pytest.mark.parametrize("name", ["local", "tcp"])
async def test_blocks_that_cannot_be_read_are_errors_and_are_retired(
    tmp_path: Path, name: str
) -> None:
    """A file cut short stands for a device with bad sectors: block 252 in part, all behind it."""
    async with attached(tmp_path, name) as client:
        transport, region = client.transport, client.region
        for block in range(BLOCKS - 8, BLOCKS):
            await transport.write(region, block * BLOCK, 1, bytes([block]) * BLOCK)
        os.truncate(client.file, client.data_offset + 252 * BLOCK + 4096)
        with pytest.raises(DamagedError, match="device"):
            await transport.read(region, (BLOCKS - 8) * BLOCK, 6 * BLOCK)
        assert await client.failed_blocks() == (252, 253)
        assert await client.device_errors() == 1
        for block in range(BLOCKS - 8, 252):
            assert await transport.read(region, block * BLOCK, BLOCK) == bytes([block]) * BLOCK
        with pytest.raises(DamagedError):
            await transport.read(region, 255 * BLOCK, 1)
        assert await client.failed_blocks() == (252, 253, 255)


@pytest.mark.parametrize("name", ["local", "tcp"])
async def test_blocks_that_cannot_be_written_are_errors_and_are_retired(
    tmp_path: Path, name: str
) -> None:
    """The limit of this process's files stands for a device that does not take bytes."""
    async with attached(tmp_path, name) as client:
        limit = client.data_offset + 100 * BLOCK
        with _file_size_limit(limit), pytest.raises(DamagedError, match="File too large"):
            await client.transport.write(client.region, 100 * BLOCK, 1, b"x" * 2 * BLOCK)
        assert await client.failed_blocks() == (100, 101)
        assert await client.device_errors() == 1
        await client.transport.write(client.region, 99 * BLOCK, 1, b"y" * BLOCK)
        assert await client.transport.read(client.region, 99 * BLOCK, BLOCK) == b"y" * BLOCK


@contextlib.contextmanager
def _file_size_limit(byte_count: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (byte_count, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


async def test_a_report_of_blocks_that_are_well_retires_nothing(tmp_path: Path) -> None:
    async with attached(tmp_path) as client:
        await client.ask(Opcode.REPORT_FAILED, ReportFailed(client.region, 0, REGION_SIZE // 8))
        with pytest.raises(InvalidError):
            await client.ask(Opcode.REPORT_FAILED, ReportFailed(client.region, REGION_SIZE, 1))
        assert await client.failed_blocks() == ()
        assert await client.device_errors() == 0


async def test_the_life_line_goes_with_the_transport(tmp_path: Path) -> None:
    async with attached(tmp_path) as client:
        await client.transport.write(client.region, 0, 1, b"x")
        fencing = Fencing(tmp_path / "state")
        assert fencing.has_life_line(CLIENT)
        await client.transport.close()
        # The kernel takes a ring apart in the background, and then lets go of the lock.
        (life_line,) = (tmp_path / "state" / "clients").glob(f"{CLIENT:016x}.*")
        with life_line.open("rb") as file:
            await trio.to_thread.run_sync(fcntl.flock, file, fcntl.LOCK_EX)
        assert not fencing.has_life_line(CLIENT)


@pytest.mark.fault
@pytest.mark.parametrize("round_number", range(5))
async def test_after_a_killed_client_is_fenced_nothing_of_it_arrives(
    tmp_path: Path, round_number: int
) -> None:
    async with attached(tmp_path) as client:
        server = client.metadata.server
        described = msgspec.json.encode(server).decode()
        child = await trio.to_thread.run_sync(
            partial(
                subprocess.Popen,
                [
                    sys.executable, "-m", "tests.transports.direct_writer", described,
                    str(client.region), "77",
                ],
                stdout=subprocess.PIPE,
            )
        )  # fmt: skip
        try:
            assert child.stdout is not None
            assert await trio.to_thread.run_sync(child.stdout.readline) == b"writing\n"
            await trio.sleep(0.05 * round_number)
            child.send_signal(signal.SIGSTOP)
            client.metadata.fence = (77,)
            heartbeats = len(client.metadata.heartbeats)
            await client.metadata.wait_for(lambda _: True, after=heartbeats + 1)
            assert not any(beat.fenced for beat in client.metadata.heartbeats)
        finally:
            child.kill()
        await client.metadata.wait_for(lambda beat: beat.fenced == (77,))
        await client.transport.write(client.region, 0, 2, bytes(REGION_SIZE))
        child.wait()
        for _ in range(20):
            assert not any(await client.transport.read(client.region, 0, REGION_SIZE // 8))


async def test_closing_with_many_writes_waiting_retires_no_block(tmp_path: Path) -> None:
    """As when a session is lost: those that the ring has no room for yet are not the device's
    fault."""
    async with attached(tmp_path) as client:
        refused: list[CrailError] = []

        async def write(block: int) -> None:
            try:
                await client.transport.write(client.region, block * BLOCK, 1, b"x" * BLOCK)
            except CrailError as error:
                refused.append(error)

        async with trio.open_nursery() as writing:
            for block in range(BLOCKS):
                writing.start_soon(write, block)
            for _ in range(2):  # all of them have begun
                await trio.lowlevel.checkpoint()
            writing.start_soon(client.transport.close)
        assert {type(error) for error in refused} <= {UnavailableError}
        assert await client.failed_blocks() == ()
        assert await client.device_errors() == 0


async def test_what_comes_after_the_end_is_not_the_devices_fault(tmp_path: Path) -> None:
    async with attached(tmp_path) as client:
        assert isinstance(client.transport, LocalTransport)
        region = client.transport._regions[client.region]
        await region.write(0, b"x" * BLOCK)
        await client.transport.close()
        with pytest.raises(UnavailableError, match="closed"):
            await region.write(0, b"y" * BLOCK)
        with pytest.raises(UnavailableError, match="closed"):
            await region.read(0, BLOCK)


async def test_only_clients_of_the_host_report_failing_blocks(tmp_path: Path) -> None:
    async with attached(tmp_path) as client:
        report = ReportFailed(client.region, 0, BLOCK, writing=True)
        server = client.metadata.server
        with pytest.raises(NotPermittedError):
            await client.ask(Opcode.REPORT_FAILED, report, f"{server.tcp_host}:{server.tcp_port}")
        assert await client.failed_blocks() == ()


@pytest.mark.skipif(libpmemobj.missing() is not None, reason="libpmemobj is missing")
async def test_a_client_that_cannot_open_all_regions_holds_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its life line would keep its blocks out of circulation for as long as it runs."""
    async with FakeMetadata().running(tmp_path) as metadata:
        config = storage_config(tmp_path, metadata, (Tier.NVME, Tier.PMEM))
        async with storage_running(config, metadata), trio.open_nursery() as nursery:
            monkeypatch.setattr(persistent_region.libpmem, "missing", lambda: "it is not here")
            with pytest.raises(CrailError, match="it is not here"):
                await connect(metadata.server, client_config(metadata, "local"), CLIENT, nursery)
            assert not Fencing(tmp_path / "state").has_life_line(CLIENT)
