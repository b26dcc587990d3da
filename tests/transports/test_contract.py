"""What every transport promises, over every medium."""

from __future__ import annotations

import contextlib
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

import pytest
import trio

from crailfs.errors import BlockLostError, InvalidError, UnavailableError
from crailfs.limits import PAYLOAD_MAX_BYTES
from crailfs.pmem import libpmemobj
from crailfs.records import Tier
from crailfs.transports import Transport, connect
from crailfs.units import KIB, MIB
from tests.storage.cluster import (
    BLOCK,
    REGION_SIZE,
    FakeMetadata,
    client_config,
    storage_config,
    storage_running,
)

_PMEM = (Tier.PMEM,) if libpmemobj.missing() is None else ()
TIERS = (*_PMEM, Tier.MEMORY, Tier.NVME, Tier.DISK)
WAYS = [(name, tier) for name in ("local", "tcp") for tier in TIERS]
SIZES = (1, 4 * KIB, 64 * KIB, 128 * KIB + 1, MIB, PAYLOAD_MAX_BYTES, 2 * PAYLOAD_MAX_BYTES + 5)


class Way(NamedTuple):
    transport: Transport
    region: int
    tier: Tier
    directory: Path


@pytest.fixture(params=WAYS, ids=lambda way: f"{way[0]}-{way[1].name.lower()}")
def way(request: pytest.FixtureRequest, tmp_path: Path) -> object:
    name, tier = request.param

    @contextlib.asynccontextmanager
    async def connected() -> AsyncIterator[Way]:
        async with (
            FakeMetadata().running(tmp_path) as metadata,
            storage_running(storage_config(tmp_path, metadata, TIERS), metadata),
            trio.open_nursery() as nursery,
        ):
            config = client_config(metadata, name, timeout_ms=2_000)
            transport = await connect(metadata.server, config, 42, nursery)
            assert transport.name == name
            yield Way(transport, metadata.region_id(tier), tier, tmp_path)
            await transport.close()

    return connected()


Connected = contextlib.AbstractAsyncContextManager[Way]


def beginning(tier: Tier, offset: int) -> int:
    """Where a write near ``offset`` can begin: direct I/O takes whole sectors."""
    return offset - offset % 4096 if tier == Tier.NVME else offset


async def test_reads_back_what_was_written_at_any_size(way: Connected) -> None:
    noise = random.Random(1)
    async with way as (transport, region, tier, _):
        for size in SIZES:
            data = noise.randbytes(size)
            offset = beginning(tier, noise.randrange(REGION_SIZE - size))
            await transport.write(region, offset, SIZES.index(size) + 1, data)
            assert bytes(await transport.read(region, offset, size)) == data


async def test_writes_change_nothing_beside_them(way: Connected) -> None:
    async with way as (transport, region, tier, _):
        begin = beginning(tier, BLOCK + 7)
        await transport.write(region, 0, 1, b"a" * (4 * BLOCK))
        await transport.write(region, begin, 1, b"b" * BLOCK)
        found = bytes(await transport.read(region, 0, 4 * BLOCK))
        assert found == b"a" * begin + b"b" * BLOCK + b"a" * (3 * BLOCK - begin)


async def test_takes_any_kind_of_buffer(way: Connected) -> None:
    async with way as (transport, region, tier, _):
        at = beginning(tier, 5_000)
        for data in (b"bytes", bytearray(b"bytearray"), memoryview(b"xx memoryview")[3:]):
            await transport.write(region, at, 1, data)
            assert bytes(await transport.read(region, at, len(data))) == bytes(data)


async def test_a_write_within_a_sector_is_refused_where_sectors_decide(way: Connected) -> None:
    async with way as (transport, region, tier, _):
        if tier == Tier.NVME:
            await transport.write(region, 0, 1, b"a" * 5_000)
            with pytest.raises(InvalidError, match="multiple of 4096"):
                await transport.write(region, 100, 1, b"b")
            assert bytes(await transport.read(region, 0, 5_001)) == b"a" * 5_000 + b"\0"


async def test_reaches_the_last_byte_and_no_further(way: Connected) -> None:
    async with way as (transport, region, tier, _):
        begin = beginning(tier, REGION_SIZE - 1)
        await transport.write(region, begin, 1, bytes(REGION_SIZE - 1 - begin) + b"z")
        assert bytes(await transport.read(region, REGION_SIZE - 1, 1)) == b"z"
        for offset, size in ((REGION_SIZE - 1, 2), (REGION_SIZE, 1), (1 << 62, 1)):
            with pytest.raises(InvalidError):
                await transport.read(region, offset, size)
            with pytest.raises(InvalidError):
                await transport.write(region, offset, 1, b"x" * size)
        assert bytes(await transport.read(region, REGION_SIZE - 1, 1)) == b"z"


async def test_a_region_that_the_server_does_not_have_is_lost(way: Connected) -> None:
    async with way as (transport, region, _, _):
        for call in (
            lambda: transport.read(77, 0, 1),
            lambda: transport.write(77, 0, 1, b"x"),
            lambda: transport.flush(77),
        ):
            with pytest.raises(BlockLostError, match="77"):
                await call()
        await transport.write(region, 0, 1, b"still usable")


async def test_only_devices_flush_durably(way: Connected) -> None:
    async with way as (transport, region, tier, _):
        await transport.write(region, 0, 1, b"x" * MIB)
        assert await transport.flush(region) is (tier in (Tier.NVME, Tier.DISK))


async def test_many_at_once_do_not_mix(way: Connected) -> None:
    async with way as (transport, region, _, _):

        async def one(index: int) -> None:
            data = bytes([index]) * (BLOCK + index)
            await transport.write(region, 2 * index * BLOCK, 1, data)
            found = await transport.read(region, 2 * index * BLOCK, len(data))
            assert bytes(found) == data

        async with trio.open_nursery() as nursery:
            for index in range(100):
                nursery.start_soon(one, index)


async def test_is_of_no_use_once_closed(way: Connected) -> None:
    async with way as (transport, region, _, _):
        await transport.write(region, 0, 1, b"x")
        await transport.close()
        with pytest.raises(UnavailableError):
            await transport.read(region, 0, 1)
        with pytest.raises(UnavailableError):
            await transport.write(region, 0, 1, b"y")
