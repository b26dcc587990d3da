"""TPC-DS data, query 77 and DuckDB's own answer to it, all offline from DuckDB's wheel."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

import duckdb

QUERY_NUMBER: Final = 77
_GENERATED: Final = 0.7
"""Roughly the part of the time that making the tables takes; the rest is writing Parquet."""

Answer = list[list[str | None]]
"""Rows of a result as text: decimals exact, whoever computed them."""


def generate(
    directory: Path,
    scale_factor: float,
    *,
    memory_limit_mib: int = 4096,
    on_progress: Callable[[float], None] = lambda _: None,
) -> Answer:
    """Write all 24 tables to ``directory/TABLE.parquet``; the answer of query 77 by DuckDB.

    Args:
        scale_factor: 1 is about 1 GB as text and 300 MB as Parquet.
    """
    directory.mkdir(parents=True)
    database = directory / "generating.duckdb"
    with duckdb.connect(str(database)) as connection:
        connection.execute("LOAD tpcds")
        connection.execute(f"SET memory_limit = '{memory_limit_mib}MiB'")
        connection.execute(f"SET temp_directory = '{directory}/duckdb-temporary'")
        connection.execute(f"CALL dsdgen(sf={scale_factor})")
        on_progress(_GENERATED)
        tables = [str(name) for (name,) in connection.execute("SHOW TABLES").fetchall()]
        for number, table in enumerate(tables, 1):
            connection.execute(f"COPY {table} TO '{directory}/{table}.parquet' (FORMAT parquet)")
            on_progress(_GENERATED + (1 - _GENERATED) * number / len(tables))
        rows = connection.execute(query()).fetchall()
    database.unlink()
    return as_text(rows)


def query() -> str:
    """Query 77 as DuckDB has it. Spark's dialect takes the same text, less the semicolon."""
    with duckdb.connect() as connection:
        connection.execute("LOAD tpcds")
        row = connection.execute(
            "SELECT query FROM tpcds_queries() WHERE query_nr = ?", [QUERY_NUMBER]
        ).fetchone()
    assert row is not None, "DuckDB's TPC-DS extension has all 99 queries"
    return str(row[0]).strip().rstrip(";")


def as_text(rows: list[tuple[object, ...]]) -> Answer:
    return [[None if value is None else str(value) for value in row] for row in rows]
