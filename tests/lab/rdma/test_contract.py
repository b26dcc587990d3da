"""What every transport promises, kept by RDMA: on one host, through the device's own loop."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from crailfs.records import Tier
from crailfs.transports import connect
from tests.storage.cluster import FakeMetadata, client_config, storage_config, storage_running
from tests.transports.test_contract import (
    Way,
    test_a_region_that_the_server_does_not_have_is_lost,
    test_is_of_no_use_once_closed,
    test_many_at_once_do_not_mix,
    test_only_disk_flushes_durably,
    test_reaches_the_last_byte_and_no_further,
    test_reads_back_what_was_written_at_any_size,
    test_takes_any_kind_of_buffer,
    test_writes_change_nothing_beside_them,
)

__all__ = [
    "test_a_region_that_the_server_does_not_have_is_lost",
    "test_is_of_no_use_once_closed",
    "test_many_at_once_do_not_mix",
    "test_only_disk_flushes_durably",
    "test_reaches_the_last_byte_and_no_further",
    "test_reads_back_what_was_written_at_any_size",
    "test_takes_any_kind_of_buffer",
    "test_writes_change_nothing_beside_them",
]


@pytest.fixture(params=(Tier.MEMORY, Tier.DISK), ids=("memory", "disk"))
def way(request: pytest.FixtureRequest, tmp_path: Path, rdma_device: str) -> object:
    @contextlib.asynccontextmanager
    async def connected() -> AsyncIterator[Way]:
        async with (
            FakeMetadata().running(tmp_path) as metadata,
            storage_running(storage_config(tmp_path, metadata), metadata),
            trio.open_nursery() as nursery,
        ):
            config = client_config(metadata, "rdma", timeout_ms=10_000)
            transport = await connect(metadata.server, config, 42, nursery)
            assert transport.name == "rdma"
            yield Way(transport, metadata.region_id(request.param), request.param, tmp_path)
            await transport.close()

    return connected()
