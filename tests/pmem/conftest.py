"""Where the tests of persistent memory put their files; skipped where libpmemobj is missing."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from crailfs.pmem import libpmem, libpmemobj
from storage_server.media.pmem_place import in_memory

missing = libpmem.missing() or libpmemobj.missing()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).resolve().parent
    for item in items:
        if missing is not None and here in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=missing))


@pytest.fixture
def on_tmpfs() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="crail-pmem-", dir="/dev/shm") as directory:
        yield Path(directory)


@pytest.fixture
def on_disk(tmp_path: Path) -> Path:
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        if in_memory(fd):
            pytest.skip("the temporary directory is on tmpfs")
    finally:
        os.close(fd)
    return tmp_path


@pytest.fixture(params=["tmpfs", "disk"])
def directory(request: pytest.FixtureRequest) -> Path:
    directory: Path = request.getfixturevalue(f"on_{request.param}")
    return directory
