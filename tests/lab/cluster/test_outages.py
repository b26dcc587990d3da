"""The other host's server, or the way to it, is gone for a while, with programs at work."""

from __future__ import annotations

from pathlib import Path

import pytest

from crailfs.limits import SESSION_TIMEOUT_MS
from tests.lab.rdma.load import Load, Outage
from tests.lab.rdma.two_hosts import TwoHosts
from tests.support.processes import wait_until

TIMEOUT_MS = 8_000
OUTAGE_S = SESSION_TIMEOUT_MS / 1000 + 4


def reached_by_rdma(cluster: TwoHosts) -> bool:
    return any(client.transport == "rdma" for client in cluster.storage_status().clients)


@pytest.mark.timeout(200)
def test_a_storage_server_that_is_killed_and_comes_back_costs_time_and_nothing_else(
    cluster: TwoHosts, rdma_mount: Path
) -> None:
    with Load(rdma_mount / "killed") as load:
        load.wait_for(3)
        cluster.kill("storage")
        cluster.start("storage")
        load.wait_for(load.done + 3)
        wait_until(lambda: reached_by_rdma(cluster), "RDMA is used again", timeout_s=30)
        load.wait_for(load.done + 2)
        load.check()
        print(load)
    cluster.audit()


@pytest.mark.timeout(200)
def test_a_link_that_stays_down_is_an_error_in_time_and_up_again_all_goes_on(
    cluster: TwoHosts, nic: str
) -> None:
    """It stays down for so long that the metadata server gives the session up."""
    mountpoint = cluster.directory / "cut"
    settings = [f"client.operation_timeout_ms={TIMEOUT_MS}"]
    with (
        cluster.mount(mountpoint, "rdma", "tcp", settings=settings),
        Load(mountpoint / "down", may_fail=True) as load,
    ):
        load.wait_for(3)
        Outage(nic).link_down_for(OUTAGE_S)
        load.wait_for(load.done + 3)
        wait_until(lambda: reached_by_rdma(cluster), "RDMA is used again", timeout_s=30)
        load.wait_for(load.done + 2)
        load.check()
        print(load)
        assert load.errors == {"EIO"}
        # Each file is several system calls; each takes at most two timeouts.
        assert max(load.longest_s, load.longest_read_s) < 4 * TIMEOUT_MS / 1000
    cluster.audit()
