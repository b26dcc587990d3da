"""What every transport promises, kept by RDMA: on one host, through the device's own loop."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from crailfs.records import Tier
from tests.lab.rdma.cluster import lab_running
from tests.transports.test_contract import (
    Way,
    test_a_region_that_the_server_does_not_have_is_lost,
    test_is_of_no_use_once_closed,
    test_many_at_once_do_not_mix,
    test_only_devices_flush_durably,
    test_reaches_the_last_byte_and_no_further,
    test_reads_back_what_was_written_at_any_size,
    test_takes_any_kind_of_buffer,
    test_writes_change_nothing_beside_them,
)

__all__ = [
    "test_a_region_that_the_server_does_not_have_is_lost",
    "test_is_of_no_use_once_closed",
    "test_many_at_once_do_not_mix",
    "test_only_devices_flush_durably",
    "test_reaches_the_last_byte_and_no_further",
    "test_reads_back_what_was_written_at_any_size",
    "test_takes_any_kind_of_buffer",
    "test_writes_change_nothing_beside_them",
]


TIERS = (Tier.MEMORY, Tier.DISK)


@pytest.fixture(params=TIERS, ids=[tier.name.lower() for tier in TIERS])
def way(request: pytest.FixtureRequest, tmp_path: Path, rdma_device: str) -> object:
    tier = request.param

    @contextlib.asynccontextmanager
    async def connected() -> AsyncIterator[Way]:
        # What is on disk has the control connection to go by, which needs no memory beside it.
        regions = {tier: tmp_path / "region", Tier.MEMORY: tmp_path / "memory"}
        async with lab_running(tmp_path, regions) as lab:
            transport = await lab.transport(timeout_ms=10_000)
            yield Way(transport, lab.metadata.region_id(tier), tier, tmp_path)
            await transport.close()

    return connected()
