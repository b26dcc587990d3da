"""One cluster with one mount for all of these tests, and a second mount for those that need it."""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from crailfs.cli.operator import connected
from crailfs.config import ClientConfig
from crailfs.config_file import Settings
from crailfs.units import MIB
from crailfs.wire.messages import Audit, AuditReply, Opcode
from tests.support.mounts import mounted
from tests.support.process_cluster import ProcessCluster, process_cluster

_HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(_HERE):
            item.add_marker(pytest.mark.mount)
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(40))


@contextlib.contextmanager
def mount_cluster() -> Iterator[ProcessCluster]:
    with tempfile.TemporaryDirectory(prefix="crailfs-mount-") as name:
        base = Path(name)
        base.chmod(0o755)  # tests go there as other users
        with process_cluster(base, memory_bytes=256 * MIB, disk_bytes=64 * MIB) as running:
            yield running


@pytest.fixture(scope="session")
def cluster() -> Iterator[ProcessCluster]:
    with mount_cluster() as running:
        yield running


@pytest.fixture(scope="session")
def other_root(cluster: ProcessCluster) -> Iterator[Path]:
    """A second mount of the same file system, by a process of its own."""
    mountpoint = cluster.state.parent / "other"
    options = ["--config", str(cluster.configuration)]
    with mounted(mountpoint, options, cluster.state / "other.log"):
        yield mountpoint


async def audit(config: ClientConfig) -> tuple[str, ...]:
    """What the metadata server finds wrong in its own tables."""
    async with connected(config.metadata, config) as metadata:
        reply = await metadata.call(Opcode.AUDIT, Audit())
    assert isinstance(reply, AuditReply)
    return reply.findings


_numbers = itertools.count()


@pytest.fixture
def place(cluster: ProcessCluster) -> Iterator[Path]:
    """A directory of the mount for this test alone, writable for everybody; audited afterwards."""
    directory = cluster.mountpoint / f"test-{next(_numbers)}"
    directory.mkdir()
    directory.chmod(0o777)
    yield directory
    findings = trio.run(audit, Settings.load(cluster.configuration).client())
    assert findings == ()


@pytest.fixture
def other_place(place: Path, other_root: Path) -> Path:
    """``place`` seen through the other mount."""
    return other_root / place.name
