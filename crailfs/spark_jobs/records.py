"""TeraSort's records: made, and checked after they were sorted.

A record is 100 bytes: a key of 10 and a value of 90, all random from a seed. They lie in Parquet
as two binary columns, so that Spark moves them in the JVM. Checking uses nothing of Spark.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy
import pyarrow
import pyarrow.parquet

KEY_BYTES: Final = 10
VALUE_BYTES: Final = 90
RECORD_BYTES: Final = KEY_BYTES + VALUE_BYTES
RECORDS_PER_FILE: Final = 1_250_000
"""At most: 125 MB, one Spark task."""
_WORDS: Final = VALUE_BYTES // 8
_FACTORS: Final = numpy.random.Generator(numpy.random.PCG64(77)).integers(
    0, 1 << 64, _WORDS + 3, dtype=numpy.uint64
) | numpy.uint64(1)

Array = numpy.ndarray[Any, Any]


class Digest(NamedTuple):
    """What sorting must not change."""

    record_count: int
    checksum: int
    """Sum of a hash of each record, modulo 2**64: the same in any order."""


class InvalidRecordsError(Exception):
    """What is wrong with the records that were to be checked."""


def generate(
    directory: Path,
    record_count: int,
    *,
    seed: int,
    on_progress: Callable[[float], None] = lambda _: None,
) -> Digest:
    """Write ``record_count`` records to Parquet files in ``directory``; the same for every call
    with the same seed."""
    directory.mkdir(parents=True)
    checksum = 0
    for first in range(0, record_count, RECORDS_PER_FILE):
        count = min(RECORDS_PER_FILE, record_count - first)
        random = numpy.random.Generator(numpy.random.PCG64([seed, first]))
        keys = _random_bytes(random, count, KEY_BYTES)
        values = _random_bytes(random, count, VALUE_BYTES)
        table = pyarrow.table({"key": _binary_array(keys), "value": _binary_array(values)})
        pyarrow.parquet.write_table(
            table,
            directory / f"records-{first // RECORDS_PER_FILE:04d}.parquet",
            compression="none",
            use_dictionary=False,
            write_statistics=False,
        )
        checksum += _checksum(keys, values)
        on_progress((first + count) / record_count)
    return Digest(record_count, checksum % (1 << 64))


def check_sorted(
    directory: Path, *, on_progress: Callable[[float], None] = lambda _: None
) -> Digest:
    """Read every Parquet file in ``directory``, in the order of their names, and make sure that
    each key is at least the one before it, over the ends of the files too.

    Raises:
        InvalidRecordsError: a key is out of order, or a record has another size.
    """
    record_count = checksum = 0
    last: tuple[int, int] = (0, 0)
    files = sorted(directory.glob("*.parquet"))
    for number, path in enumerate(files, 1):
        for keys, values in _read(path):
            high = keys[:, :8].copy().view(">u8")[:, 0].astype(numpy.uint64)
            low = keys[:, 8:].copy().view(">u2")[:, 0]
            in_order = (high[1:] > high[:-1]) | ((high[1:] == high[:-1]) & (low[1:] >= low[:-1]))
            first = (int(high[0]), int(low[0]))
            if first < last or not in_order.all():
                raise InvalidRecordsError(
                    f"{path} is not sorted: a key in records {record_count} to "
                    f"{record_count + len(keys)} is less than the one before it"
                )
            last = (int(high[-1]), int(low[-1]))
            record_count += len(keys)
            checksum += _checksum(keys, values)
        on_progress(number / len(files))
    return Digest(record_count, checksum % (1 << 64))


def _read(path: Path) -> Iterator[tuple[Array, Array]]:
    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=1 << 18, columns=["key", "value"]):
            if batch.num_rows:
                yield (
                    _matrix(batch.column(0), KEY_BYTES, path),
                    _matrix(batch.column(1), VALUE_BYTES, path),
                )


def _matrix(column: Any, width: int, path: Path) -> Array:
    """The column's bytes, one row each."""
    _, offset_buffer, data = column.buffers()
    count = len(column)
    offsets = numpy.frombuffer(offset_buffer, numpy.int32)[column.offset :][: count + 1]
    if column.null_count or not (numpy.diff(offsets) == width).all():
        raise InvalidRecordsError(f"{path} has a {width}-byte field of another size")
    start = int(offsets[0])
    return numpy.frombuffer(data, numpy.uint8)[start : start + count * width].reshape(count, width)


def _random_bytes(random: numpy.random.Generator, count: int, width: int) -> Array:
    words = random.integers(0, 1 << 64, -(-count * width // 8), dtype=numpy.uint64)
    return words.view(numpy.uint8)[: count * width].reshape(count, width)


def _binary_array(rows: Array) -> Any:
    count, width = rows.shape
    offsets = numpy.arange(0, (count + 1) * width, width, dtype=numpy.int32)
    buffers = [None, pyarrow.py_buffer(offsets), pyarrow.py_buffer(rows)]
    return pyarrow.Array.from_buffers(pyarrow.binary(), count, buffers)


def _checksum(keys: Array, values: Array) -> int:
    """Of these records: not linear in a record, so that no exchange of parts keeps it."""
    words = numpy.ascontiguousarray(values[:, : _WORDS * 8]).view("<u8")
    hashed = keys[:, :8].copy().view("<u8")[:, 0] * _FACTORS[_WORDS]
    hashed += keys[:, 8:].copy().view("<u2")[:, 0] * _FACTORS[_WORDS + 1]
    hashed += values[:, _WORDS * 8 :].copy().view("<u2")[:, 0] * _FACTORS[_WORDS + 2]
    for column in range(_WORDS):
        hashed += words[:, column] * _FACTORS[column]
    hashed ^= hashed >> numpy.uint64(32)
    hashed *= _FACTORS[0]
    hashed ^= hashed >> numpy.uint64(29)
    return int(hashed.sum(dtype=numpy.uint64))
