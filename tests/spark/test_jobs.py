"""Spark shuffles and spills on a mounted CrailFS and gives the right answers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pyspark
import pytest

from crailfs.bench.workbench import Workbench
from crailfs.spark_jobs import records, tpcds
from crailfs.spark_jobs.job import (
    QUERY_77,
    TERASORT,
    JobResult,
    JobSpecification,
    clean_environment,
)

pytestmark = [pytest.mark.spark, pytest.mark.mount, pytest.mark.timeout(240)]

RECORD_COUNT = 300_000
JOB_TIMEOUT_SECONDS = 150


@pytest.fixture(scope="module")
def bed() -> Iterator[Workbench]:
    with Workbench("spark-test") as bed:
        bed.start_crail("--memory", "256MiB", "--disk", "512MiB")
        yield bed


def run(
    bed: Workbench, job: str, input_directory: Path, settings: dict[str, str], **environment: str
) -> JobResult:
    specification = JobSpecification(
        job=job,
        input_directory=str(input_directory),
        local_directory=str(bed.mountpoint / "spark"),
        output_directory=str(bed.mountpoint / "output"),
        temporary_directory=str(bed.temporary),
        result_file=str(bed.directory / "result.json"),
        settings={"spark.driver.memory": "1g", **settings},
    )
    file = bed.directory / "specification.json"
    file.write_bytes(msgspec.json.encode(specification))
    log = bed.directory / "job.log"
    process = bed.start(
        [sys.executable, "-m", "crailfs.spark_jobs.job", str(file)],
        log,
        {**clean_environment(bed.temporary), **environment},
    )
    try:
        process.communicate(timeout=JOB_TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        pytest.fail(f"{job} did not end:\n{log.read_text()}")
    assert process.returncode == 0, log.read_text()
    return msgspec.json.decode((bed.directory / "result.json").read_bytes(), type=JobResult)


def test_terasort_spills_and_shuffles_on_the_mount(bed: Workbench) -> None:
    """With more than one spill a map task, which are merged, and spills of the sort after it."""
    digest = records.generate(bed.directory / "records", RECORD_COUNT, seed=7)
    result = run(
        bed,
        TERASORT,
        bed.directory / "records",
        {
            "spark.sql.shuffle.partitions": "4",
            "spark.sql.adaptive.enabled": "false",
            "spark.shuffle.sort.bypassMergeThreshold": "1",
            "spark.shuffle.spill.numElementsForceSpillThreshold": str(RECORD_COUNT // 20),
        },
    )
    assert records.check_sorted(bed.mountpoint / "output") == digest
    assert result.shuffle_bytes > RECORD_COUNT * records.RECORD_BYTES
    # Each record at least once in the map tasks and once in the sort.
    assert result.spilled_bytes > 2 * RECORD_COUNT * records.RECORD_BYTES
    assert result.local_bytes >= result.shuffle_bytes
    assert result.local_files >= 3, "data, index and checksums of a map task"


def test_executors_of_their_own_read_each_others_files(bed: Workbench, tmp_path: Path) -> None:
    """Two executor processes: shuffle blocks are read by another process than wrote them."""
    answer = tpcds.generate(bed.directory / "tables", 0.01)
    spark_home = tmp_path / "spark-home"
    spark_home.mkdir()
    for path in Path(pyspark.__file__).parent.iterdir():
        (spark_home / path.name).symlink_to(path)
    result = run(
        bed,
        QUERY_77,
        bed.directory / "tables",
        {
            "spark.master": "local-cluster[2,1,768]",
            "spark.executor.memory": "768m",
            "spark.sql.shuffle.partitions": "4",
        },
        # The workers put their directories below it.
        SPARK_HOME=str(spark_home),
    )
    assert result.answer == answer
    assert result.shuffle_bytes > 0
    assert result.local_files > 0
