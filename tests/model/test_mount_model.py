"""Random operations on a CrailFS mount and on a local file system at the same time."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from crailfs.units import MIB
from tests.model.machine import FileSystemModel
from tests.support.process_cluster import ProcessCluster, process_cluster

SEED = int(os.environ.get("CRAIL_TEST_SEED", "20261120"))
EXAMPLES = int(os.environ.get("CRAIL_TEST_MODEL_EXAMPLES", "60"))
STEPS = 50


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessCluster]:
    base = tmp_path_factory.mktemp("model")
    for directory in (base, *list(base.parents)[:2]):
        directory.chmod(0o755)
    with process_cluster(base, memory_bytes=256 * MIB, disk_bytes=256 * MIB) as running:
        (base / "local").mkdir()
        yield running


@pytest.mark.mount
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_mount_behaves_as_a_local_file_system(cluster: ProcessCluster) -> None:
    print(f"seed {SEED}, {EXAMPLES} examples of {STEPS} steps")

    class Model(FileSystemModel):
        mount_root = str(cluster.mountpoint)
        local_root = str(cluster.state.parent / "local")

        def teardown(self) -> None:
            super().teardown()
            cluster.audit()

    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        seed(SEED)(Model),
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            database=None,
            print_blob=True,
            phases=(Phase.generate,),
            suppress_health_check=list(HealthCheck),
        ),
    )
