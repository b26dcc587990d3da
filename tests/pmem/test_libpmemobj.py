"""The binding of libpmemobj: pools, objects and transactions, also in processes that are killed."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from crailfs.pmem import libpmemobj
from crailfs.pmem.libpmemobj import Pool
from crailfs.units import MIB

LAYOUT = "test"


@pytest.fixture
def path(directory: Path) -> Path:
    path = directory / "pool"
    path.write_bytes(b"")
    os.truncate(path, 32 * MIB)
    return path


@pytest.fixture
def pool(path: Path) -> Iterator[Pool]:
    pool = Pool.create(path, LAYOUT, count_unsafe_shutdowns=True)
    yield pool
    if pool.address:
        pool.close()


def close(pool: Pool) -> None:
    pool.close()
    pool.address = 0


def test_what_is_in_a_pool_is_there_when_it_is_opened_again(pool: Pool, path: Path) -> None:
    assert pool.root_bytes() == 0
    root = pool.root(1000)
    assert pool.read(root, 1000) == bytes(1000)
    pool.write(root, b"durable")
    close(pool)
    assert libpmemobj.check(path, LAYOUT)
    again = Pool.open(path, LAYOUT)
    assert again.root_bytes() == 1000
    assert again.root(1000) == root
    assert again.read(root, 7) == b"durable"
    again.close()


def test_offsets_are_those_of_the_file(pool: Pool, path: Path) -> None:
    offset = pool.allocate(4 * MIB, zero=True)
    assert pool.read(offset, 4 * MIB) == bytes(4 * MIB)
    pool.write(offset + 4 * MIB - 4, b"last")
    pool.persist(offset, 4 * MIB)
    assert path.read_bytes()[offset + 4 * MIB - 4 : offset + 4 * MIB] == b"last"


def test_a_full_pool_refuses_another_object(pool: Pool) -> None:
    with pytest.raises(OSError) as raised:
        pool.allocate(40 * MIB, zero=False)
    assert raised.value.errno == errno.ENOMEM


def test_a_transaction_that_is_left_changes_all(pool: Pool, path: Path) -> None:
    root = pool.root(100)
    with pool.transaction() as transaction:
        transaction.write(root, b"first")
        transaction.write(root + 90, b"second")
    close(pool)
    again = Pool.open(path, LAYOUT)
    assert again.read(root, 5) == b"first"
    assert again.read(root + 90, 6) == b"second"
    again.close()


def test_a_transaction_that_raises_changes_nothing(pool: Pool) -> None:
    root = pool.root(MIB)
    pool.write(root, b"old" * 1000)
    with pytest.raises(RuntimeError, match="on the way"), pool.transaction() as transaction:
        transaction.write(root, b"new" * 1000)
        transaction.write(root + 500_000, b"new" * 1000)
        assert pool.read(root, 3) == b"new"
        raise RuntimeError("on the way")
    assert pool.read(root, 3000) == b"old" * 1000
    assert pool.read(root + 500_000, 3000) == bytes(3000)
    with pool.transaction() as transaction:
        transaction.write(root, b"afterwards")
    assert pool.read(root, 10) == b"afterwards"


def test_a_transaction_without_room_for_its_log_changes_nothing(pool: Pool) -> None:
    root = pool.root(20 * MIB)
    pool.write(root, b"old")
    with pytest.raises(OSError, match="memory"), pool.transaction() as transaction:
        transaction.write(root, b"new")
        transaction.write(root, bytes(20 * MIB))
    assert pool.read(root, 3) == b"old"


KILLED = """
import os, signal, sys
from pathlib import Path
from crailfs.pmem.libpmemobj import Pool
pool = Pool.open(Path(sys.argv[1]), "test")
root = pool.root(pool.root_bytes())
with pool.transaction() as transaction:
    transaction.write(root, b"new" * 1000)
with pool.transaction() as transaction:
    transaction.write(root, b"torn" * 1000)
    transaction.write(root + 500_000, b"torn" * 1000)
    pool.persist(root, 1_000_000)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_had_not_committed_is_undone_when_the_pool_is_opened(
    pool: Pool, path: Path
) -> None:
    root = pool.root(1_000_000)
    pool.write(root, b"old" * 1000)
    close(pool)
    killed = subprocess.run([sys.executable, "-c", KILLED, path], check=False, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert b"torntorn" in path.read_bytes()
    assert libpmemobj.check(path, LAYOUT)
    again = Pool.open(path, LAYOUT)
    assert again.read(root, 3000) == b"new" * 1000
    assert again.read(root + 500_000, 4000) == bytes(4000)
    again.close()


def test_a_pool_that_is_open_is_not_opened_again(pool: Pool, path: Path) -> None:
    with pytest.raises(BlockingIOError):
        Pool.open(path, LAYOUT)


def test_a_pool_of_another_layout_is_refused(pool: Pool, path: Path) -> None:
    close(pool)
    with pytest.raises(OSError, match="wrong layout"):
        Pool.open(path, "another")


def test_a_damaged_pool_is_refused(pool: Pool, path: Path) -> None:
    close(pool)
    with path.open("r+b") as file:
        file.seek(40)
        file.write(b"damaged")
    with pytest.raises(OSError, match="checksum"):
        libpmemobj.check(path, LAYOUT)
    with pytest.raises(OSError, match="checksum"):
        Pool.open(path, LAYOUT)


def test_a_pool_that_is_cut_short_is_found_by_check_and_refused(pool: Pool, path: Path) -> None:
    close(pool)
    os.truncate(path, 31 * MIB)
    assert not libpmemobj.check(path, LAYOUT)
    with pytest.raises(OSError, match="failed"):
        Pool.open(path, LAYOUT)


def test_no_pool_is_made_over_something_else(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"somebody's thesis")
    with pytest.raises(OSError):
        Pool.create(path, LAYOUT, count_unsafe_shutdowns=True)
    assert path.read_bytes().startswith(b"somebody's thesis")
