"""State that is damaged is refused with what to do, and is not changed."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from crailfs.errors import DamagedError
from crailfs.units import ROOT_INODE
from metadata_server.driver import Driver
from tests.metadata.name_space import NameSpace, config

PAGE_BYTES = 4096


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state directory of 600 files, as a crash leaves it: half in LMDB, half in the journal."""
    space = NameSpace(tmp_path_factory.mktemp("damage") / "state")
    for number in range(300):
        space.create(b"%03d" % number)
        space.set_xattr(ROOT_INODE, b"user.%03d" % (number % 7), b"x" * 5000)
    space.driver.checkpoint()
    for number in range(300, 600):
        space.create(b"%03d" % number)
    space.driver._txn.abort()
    space.driver._state.close()
    return space.state


@pytest.fixture
def state(stopped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / "state"))


def _refused(state: Path) -> str:
    before = {path: path.read_bytes() for path in _files(state)}
    with pytest.raises(DamagedError) as caught:
        Driver.open(config(state))
    assert {path: path.read_bytes() for path in _files(state)} == before
    assert "crail fsck" in caught.value.message
    return caught.value.message


def _files(state: Path) -> list[Path]:
    return [path for path in state.rglob("*") if path.is_file() and path.name != "lock"]


def test_the_undamaged_state_opens(state: Path) -> None:
    space = NameSpace(state)
    assert len(space.page(ROOT_INODE, entry_limit=1000).entries) == 600
    space.assert_sound()
    space.driver.close()


@pytest.mark.parametrize("keep", [0, 100, PAGE_BYTES, 2 * PAGE_BYTES, 0.5, 0.9])
def test_a_truncated_database(state: Path, keep: float) -> None:
    database = state / "lmdb" / "data.mdb"
    data = database.read_bytes()
    kept_bytes = int(keep * len(data)) if isinstance(keep, float) else keep
    database.write_bytes(data[:kept_bytes])
    assert "data.mdb" in _refused(state)


def _zero(page: bytes) -> bytes:
    return bytes(len(page))


def _random(page: bytes) -> bytes:
    return random.Random(1).randbytes(len(page))


def _shifted(page: bytes) -> bytes:
    return page[1:] + page[:1]


@pytest.mark.parametrize("damage", [_zero, _random, _shifted])
def test_pages_that_are_not_what_they_were(state: Path, damage: Callable[[bytes], bytes]) -> None:
    """Each page in turn: the server refuses to start, or to use a row that is not what was
    written, or the page was not in use and nothing is missing."""
    database = state / "lmdb" / "data.mdb"
    whole = database.read_bytes()
    journal = (state / "journal").read_bytes()
    refused = 0
    for begin in range(0, len(whole), PAGE_BYTES):
        page = whole[begin : begin + PAGE_BYTES]
        database.write_bytes(whole[:begin] + damage(page) + whole[begin + PAGE_BYTES :])
        (state / "journal").write_bytes(journal)
        try:
            driver = Driver.open(config(state))
        except DamagedError:
            refused += 1
        else:
            try:
                found = driver.audit()
                assert found.findings == ()
                assert found.counts["file_nodes"] == 600
            except DamagedError:
                refused += 1
            driver.close()
    assert refused > 20


def test_a_database_that_lost_its_newest_commit(state: Path) -> None:
    """LMDB goes on from the older of its meta pages when the newer one seems to be older still."""
    Driver.open(config(state)).close()
    database = state / "lmdb" / "data.mdb"
    data = bytearray(database.read_bytes())
    # 16 bytes of page header, then the transaction's number is the last of 136 bytes.
    numbers = [page * PAGE_BYTES + 16 + 128 for page in (0, 1)]
    newest = max(numbers, key=lambda at: int.from_bytes(data[at : at + 8], "little"))
    data[newest : newest + 8] = bytes(8)
    database.write_bytes(data)
    assert "that it had committed" in _refused(state)


@pytest.mark.parametrize("seed", range(5))
def test_flipped_bytes_are_never_served(state: Path, seed: int) -> None:
    """Values too are checked: whatever can still be read is what was written."""
    database = state / "lmdb" / "data.mdb"
    whole = database.read_bytes()
    journal = (state / "journal").read_bytes()
    choose = random.Random(seed)
    refused = 0
    for _ in range(20):
        damaged = bytearray(whole)
        for _ in range(choose.choice((1, 8, 64))):
            damaged[choose.randrange(len(damaged))] ^= 1 << choose.randrange(8)
        database.write_bytes(damaged)
        (state / "journal").write_bytes(journal)
        try:
            driver = Driver.open(config(state))
        except DamagedError:
            refused += 1
            continue
        try:
            found = driver.audit()
            assert found.findings == ()
            assert found.counts["file_nodes"] == 600
        except DamagedError:
            refused += 1
        driver.close()
    assert refused > 5


def test_missing_parts(state: Path) -> None:
    (state / "journal").rename(state / "away")
    assert "journal is missing" in _refused(state)
    (state / "away").rename(state / "journal")
    (state / "lmdb" / "data.mdb").rename(state / "away")
    assert "data.mdb is missing" in _refused(state)
    (state / "lmdb").rmdir()
    assert "no LMDB" in _refused(state)


def test_a_damaged_journal(state: Path) -> None:
    journal = state / "journal"
    data = bytearray(journal.read_bytes())
    data[len(data) // 2] ^= 1
    journal.write_bytes(data)
    assert "journal" in _refused(state)


def test_the_journal_of_another_name_space(state: Path, tmp_path: Path) -> None:
    Driver.open(config(tmp_path / "other")).close()
    shutil.copy(tmp_path / "other" / "journal", state / "journal")
    assert "belongs to cluster" in _refused(state)
