"""Makes the jobs' input and checks their output, in a process of its own:

    python -m crailfs.spark_jobs.data make-records DIRECTORY RECORD_COUNT RESULT_FILE
    python -m crailfs.spark_jobs.data make-tables DIRECTORY SCALE_FACTOR RESULT_FILE
    python -m crailfs.spark_jobs.data check-records DIRECTORY RESULT_FILE

It prints its progress, ``progress FRACTION`` a line. The result is the records' digest, or
DuckDB's answer to query 77. Checked records are removed.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Final

import msgspec

from crailfs.spark_jobs import records, tpcds

SEED: Final = 2026


def main(arguments: list[str]) -> int:
    action, place, *numbers, result_file = arguments
    directory = Path(place)
    result: records.Digest | tpcds.Answer
    try:
        if action == "make-records":
            result = records.generate(directory, int(numbers[0]), seed=SEED, on_progress=_show)
        elif action == "make-tables":
            result = tpcds.generate(directory, float(numbers[0]), on_progress=_show)
        else:
            result = records.check_sorted(directory, on_progress=_show)
            shutil.rmtree(directory)
    except records.InvalidRecordsError as error:
        print(error, file=sys.stderr)
        return 1
    Path(result_file).write_bytes(msgspec.json.encode(result))
    return 0


def _show(fraction: float) -> None:
    print(f"progress {fraction:.3f}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
