"""One Spark job in a process of its own: ``python -m crailfs.spark_jobs.job SPECIFICATION``.

It prints its progress, ``progress FRACTION`` a line, and writes its result as JSON.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path
from typing import Any, Final

import msgspec
from pyspark.sql import SparkSession

from crailfs.spark_jobs import tpcds

TERASORT: Final = "TeraSort"
QUERY_77: Final = "TPC-DS query 77"
_PARTITION_COUNT: Final = 16
_PROGRESS_INTERVAL_SECONDS: Final = 0.5


class JobSpecification(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    job: str
    input_directory: str
    local_directory: str
    """``spark.local.dir``: where Spark shuffles and spills."""
    output_directory: str
    """TeraSort's sorted records; must not exist."""
    temporary_directory: str
    """For what is neither shuffled nor spilled."""
    result_file: str
    settings: dict[str, str] = {}
    """Further Spark settings."""


class JobResult(msgspec.Struct, kw_only=True):
    wall_seconds: float
    """Of the job alone: Spark's own start is not in it."""
    shuffle_bytes: int
    """Written by map tasks, as Spark counts them."""
    spilled_bytes: int
    """Written to the local directory for want of memory."""
    local_bytes: int
    """What lies in the local directory when the job has ended: its shuffle files."""
    local_files: int
    answer: tpcds.Answer
    """Query 77's rows; empty for TeraSort, whose answer is its output."""


def default_settings(specification: JobSpecification) -> dict[str, str]:
    """One JVM with two task threads and 2 GB: fits two cores and an 8 GB machine, and makes the
    sort go through its files. Everything that decides how Spark uses files is at its default,
    except that joins may not broadcast, so that they shuffle."""
    return {
        "spark.master": "local[2]",
        "spark.local.dir": specification.local_directory,
        "spark.driver.memory": "2g",
        "spark.driver.host": "127.0.0.1",
        "spark.driver.bindAddress": "127.0.0.1",
        "spark.sql.shuffle.partitions": str(_PARTITION_COUNT),
        "spark.sql.autoBroadcastJoinThreshold": "-1",
        "spark.sql.warehouse.dir": f"{specification.temporary_directory}/warehouse",
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.log.level": "WARN",
    }


def clean_environment(temporary_directory: Path) -> dict[str, str]:
    """This process's environment for one that runs Spark: nothing in it may override the
    specification, and nothing of Spark's is to be left in ``/tmp``."""
    foreign = ("SPARK_", "PYSPARK_", "HADOOP_", "YARN_", "JAVA_TOOL_OPTIONS", "JDK_JAVA_OPTIONS")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    return {
        **kept,
        "TMPDIR": str(temporary_directory),
        "SPARK_LOCAL_IP": "127.0.0.1",
        "JDK_JAVA_OPTIONS": f"-XX:-UsePerfData -Djava.io.tmpdir={temporary_directory}",
    }


def main() -> int:
    specification = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=JobSpecification)
    builder = SparkSession.builder.appName(specification.job)
    for name, value in {**default_settings(specification), **specification.settings}.items():
        builder = builder.config(name, value)
    spark = builder.getOrCreate()
    reporter = _ProgressReporter(spark, _expected_task_count(specification))
    try:
        reporter.start()
        began = time.monotonic()
        if specification.job == TERASORT:
            _terasort(spark, specification)
            answer: tpcds.Answer = []
        else:
            answer = _query_77(spark, specification)
        wall_seconds = time.monotonic() - began
        reporter.stop()
        shuffle_bytes, spilled_bytes = _stage_totals(spark)
        local_bytes, local_files = shuffle_files(Path(specification.local_directory))
        result = JobResult(
            wall_seconds=wall_seconds,
            shuffle_bytes=shuffle_bytes,
            spilled_bytes=spilled_bytes,
            local_bytes=local_bytes,
            local_files=local_files,
            answer=answer,
        )
    finally:
        reporter.stop()
        spark.stop()
    Path(specification.result_file).write_bytes(msgspec.json.encode(result))
    return 0


def _terasort(spark: Any, specification: JobSpecification) -> None:
    records = spark.read.parquet(specification.input_directory)
    ordered = records.sort("key")
    ordered.write.option("compression", "none").parquet(specification.output_directory)


def _query_77(spark: Any, specification: JobSpecification) -> tpcds.Answer:
    for path in sorted(Path(specification.input_directory).glob("*.parquet")):
        spark.read.parquet(str(path)).createOrReplaceTempView(path.stem)
    rows = spark.sql(tpcds.query()).collect()
    return tpcds.as_text([tuple(row) for row in rows])


def _stage_totals(spark: Any) -> tuple[int, int]:
    """Bytes that all stages shuffled and spilled, from Spark's own books."""
    context = spark.sparkContext
    no_quantiles = context._gateway.new_array(context._jvm.double, 0)
    stages = context._jsc.sc().statusStore().stageList(None, False, False, no_quantiles, None)
    each = [stages.apply(index) for index in range(stages.size())]
    return (
        sum(int(stage.shuffleWriteBytes()) for stage in each),
        sum(int(stage.diskBytesSpilled()) for stage in each),
    )


def shuffle_files(local_directory: Path) -> tuple[int, int]:
    """Bytes and files of shuffled data below Spark's local directory."""
    sizes = [
        path.stat().st_size
        for path in local_directory.glob("**/blockmgr-*/*/shuffle_*")
        if not path.name.endswith(".tmp")
    ]
    return sum(sizes), len(sizes)


def _expected_task_count(specification: JobSpecification) -> int:
    """Roughly, for the progress display."""
    if specification.job == QUERY_77:
        return 60
    file_count = len(list(Path(specification.input_directory).iterdir()))
    return 2 * file_count + _PARTITION_COUNT


class _ProgressReporter:
    """Prints which part of the tasks has ended."""

    def __init__(self, spark: Any, expected_task_count: int) -> None:
        self._expected_task_count = expected_task_count
        self._tracker = spark.sparkContext.statusTracker()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._stopping.wait(_PROGRESS_INTERVAL_SECONDS):
            stages = [
                info
                for job in self._tracker.getJobIdsForGroup(None)
                for stage in self._tracker.getJobInfo(job).stageIds
                if (info := self._tracker.getStageInfo(stage)) is not None
            ]
            # Spark learns of a stage when those before it are done.
            task_count = max(sum(stage.numTasks for stage in stages), self._expected_task_count)
            done = sum(stage.numCompletedTasks for stage in stages) / task_count
            print(f"progress {done:.3f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
