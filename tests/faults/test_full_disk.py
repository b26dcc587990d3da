"""The file system under the metadata server's state is full: nothing acknowledged is lost."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from crailfs.client.blocking import BlockingStore
from crailfs.errors import CrailError
from tests.support.process_cluster import process_cluster

SMALL = "size=4m"
LARGE = "size=64m"
STEPS_MAX = 100_000


@contextlib.contextmanager
def tmpfs(path: Path, size: str) -> Iterator[None]:
    path.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "crailfs-test", str(path)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


@pytest.mark.fault
@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_full_disk_under_the_journal(tmp_path: Path) -> None:
    state = tmp_path / "state" / "metadata"
    with (
        tmpfs(state, SMALL),
        process_cluster(tmp_path, operation_timeout_ms=3_000, mount=False) as cluster,
    ):
        acknowledged = []
        with BlockingStore(cluster.client_config()) as store:
            store.write("/file", b"content")
            with pytest.raises(CrailError) as raised:
                for number in range(STEPS_MAX):
                    name = f"{number:06}-{'x' * 200}"
                    store.symlink(f"/{name}", "y" * 1_000)
                    acknowledged.append(name)
            print(f"after {len(acknowledged)} steps: {raised.value!r}")
            process = cluster.running["metadata"].process
            assert process.wait(10) == 1
            assert cluster.log("metadata").splitlines()[-1].startswith(f"crail metadata: {state}: ")
            assert "make room there" in cluster.log("metadata")
            subprocess.run(["mount", "-o", f"remount,{LARGE}", str(state)], check=True)
            cluster.start("metadata")
            store.symlink("/after", "target")
            names = {entry.name for entry in store.list("/")}
            lost = set(acknowledged) - names
            assert not lost, f"{len(lost)} acknowledged names are lost"
            assert "after" in names
            assert store.read("/file") == b"content"
