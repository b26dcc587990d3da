"""One file system over two hosts for all tests here, and two mounts of it on this one."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.peer import Peer
from tests.lab.rdma.two_hosts import TOO_NEAR, TwoHosts, two_hosts


@pytest.fixture(scope="package")
def cluster(peer: Peer, rdma_device: str, devdax: Path) -> Iterator[TwoHosts]:
    with (
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryDirectory(prefix="crailfs-lab-") as directory,
    ):
        patch.delenv(TOO_NEAR)
        os.chmod(directory, 0o755)  # the model's steps run as other users
        with two_hosts(peer, Path(directory), devdax) as running:
            yield running


@pytest.fixture(scope="package")
def rdma_mount(cluster: TwoHosts) -> Iterator[Path]:
    mountpoint = cluster.directory / "rdma"
    with cluster.mount(mountpoint, "rdma"):
        yield mountpoint


@pytest.fixture(scope="package")
def tcp_mount(cluster: TwoHosts) -> Iterator[Path]:
    mountpoint = cluster.directory / "tcp"
    with cluster.mount(mountpoint, "tcp"):
        yield mountpoint
