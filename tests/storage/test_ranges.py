"""Flushing only some bytes of a region."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from crailfs.errors import CrailError, InvalidError
from crailfs.net.client import RpcClient
from crailfs.pmem import libpmem, libpmemobj
from crailfs.records import Tier
from crailfs.wire.messages import FlushRegion, FlushReply, Opcode, Role
from storage_server import services
from tests.storage.cluster import (
    BLOCK,
    CREDENTIALS,
    REGION_SIZE,
    FakeMetadata,
    storage_config,
    storage_running,
)

pytestmark = pytest.mark.skipif(
    bool(libpmem.missing() or libpmemobj.missing()), reason="libpmem is missing"
)


async def flush(metadata: FakeMetadata, offset: int, byte_count: int) -> FlushReply:
    request = FlushRegion(metadata.region_id(Tier.PMEM), offset, byte_count)
    address = f"unix:{metadata.server.unix_path}"
    client = RpcClient(address, CREDENTIALS, role=Role.CLIENT, client_id=7)
    outcome: list[FlushReply] = []
    failure: CrailError | None = None
    async with trio.open_nursery() as nursery:
        await nursery.start(client.run)
        try:
            outcome.append(await client.call(Opcode.FLUSH_REGION, request))
        except CrailError as error:
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
    return outcome[0]


async def test_ranges_are_synced_as_much_as_the_whole_region(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a file that is no persistent memory, where nothing else takes bytes to the device."""
    synced = _noted(monkeypatch, "msync")
    async with FakeMetadata().running(tmp_path) as metadata:
        config = storage_config(tmp_path, metadata, [Tier.PMEM])
        async with storage_running(config, metadata):
            for offset, byte_count in ((0, 0), (BLOCK, 100)):
                synced.clear()
                await flush(metadata, offset, byte_count)
                assert synced
            with pytest.raises(InvalidError):
                await flush(metadata, BLOCK, REGION_SIZE)


async def test_large_ranges_are_written_back_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(services, "PERSISTED_IN_PLACE_MAX_BYTES", BLOCK)
    persisted = _noted(monkeypatch, "persist")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        directory = Path(name)
        async with FakeMetadata().running(directory) as metadata:
            config = storage_config(directory, metadata, [Tier.PMEM])
            async with storage_running(config, metadata):
                for byte_count in (BLOCK, 3 * BLOCK):
                    persisted.clear()
                    assert not (await flush(metadata, 0, byte_count)).durable
                    assert persisted == [byte_count]


def _noted(monkeypatch: pytest.MonkeyPatch, name: str) -> list[int]:
    """The lengths with which ``libpmem``'s function was called; it still does its work."""
    function: Callable[[int, int], None] = getattr(libpmem, name)
    lengths: list[int] = []

    def noting(address: int, byte_count: int) -> None:
        lengths.append(byte_count)
        function(address, byte_count)

    monkeypatch.setattr(libpmem, name, noting)
    return lengths
