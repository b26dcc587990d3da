"""Random operations on a CrailFS mount and on a local file system at the same time."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from crailfs.units import MIB
from tests.model.machine import FileSystemModel
from tests.support.mounts import mounted
from tests.support.process_cluster import ProcessCluster, process_cluster

SEED = int(os.environ.get("CRAIL_TEST_SEED", "20261120"))
EXAMPLES = int(os.environ.get("CRAIL_TEST_MODEL_EXAMPLES", "120"))
STEPS = 50


@pytest.fixture(scope="module")
def cluster() -> Iterator[ProcessCluster]:
    # Not below pytest's own directory, which is closed to the users that the steps run as.
    base = Path(tempfile.mkdtemp(prefix="crailfs-model-"))
    try:
        base.chmod(0o755)
        (base / "local").mkdir()
        with process_cluster(base, memory_bytes=256 * MIB, disk_bytes=256 * MIB) as running:
            yield running
    finally:
        shutil.rmtree(base)


def run_model(cluster: ProcessCluster, mounts: tuple[Path, ...], examples: int) -> None:
    print(f"seed {SEED}, {examples} examples of up to {STEPS} steps")

    class Model(FileSystemModel):
        mount_roots = tuple(str(mount) for mount in mounts)
        local_root = tempfile.mkdtemp(dir=cluster.state.parent / "local")

        def teardown(self) -> None:
            super().teardown()
            cluster.audit()

    os.chmod(Model.local_root, 0o755)
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        seed(SEED)(Model),
        settings=settings(
            max_examples=examples,
            stateful_step_count=STEPS,
            deadline=None,
            database=None,
            print_blob=True,
            phases=(Phase.generate,),
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.mount
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_mount_behaves_as_a_local_file_system(cluster: ProcessCluster) -> None:
    run_model(cluster, (cluster.mountpoint,), EXAMPLES)


@pytest.mark.mount
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_two_mounts_behave_as_one_local_file_system(cluster: ProcessCluster) -> None:
    """Each step on the other mount: whatever one has done and closed, the other sees."""
    other = cluster.state.parent / "other"
    options = ("--config", str(cluster.configuration))
    with mounted(other, options, cluster.state / "other.log"):
        first = cluster.mountpoint / "two"
        first.mkdir()
        first.chmod(0o755)
        run_model(cluster, (first, other / "two"), EXAMPLES // 2)
