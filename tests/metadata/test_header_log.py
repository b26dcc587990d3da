"""Regions' headers follow the name space; a block is used again only when its header is clear."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from crailfs.errors import CrailError, InvalidError, NoSpaceError, TryAgainError
from crailfs.limits import HEADER_CHANGES_MAX
from crailfs.records import ANY_TIER, Extent, Location, RegionInfo, StorageServerInfo, Tier
from crailfs.wire.messages import (
    CommitFile,
    EndSalvage,
    FetchHeaderChanges,
    GetClusterMap,
    GetStatistics,
    Grant,
    GrantBlocks,
    Opcode,
    RegisterStorage,
)
from metadata_server import schema, state_directory
from metadata_server import space as spaces
from metadata_server.driver import Driver
from tests.metadata.headers import BLOCKS, Headered
from tests.metadata.name_space import BLOCK_SIZE_BYTES, SERVER_ID, NameSpace, config


@pytest.fixture
def headered(tmp_path: Path) -> Iterator[Headered]:
    space = Headered(tmp_path / "state")
    yield space
    space.assert_sound()
    space.driver.close()


def counts(space: NameSpace) -> dict[str, int]:
    return space.driver.audit().counts


def test_headers_follow_commits_truncations_and_removals(headered: Headered) -> None:
    ino = headered.create(b"file").ino
    headered.put(ino, 10 * BLOCK_SIZE_BYTES + 5)
    headered.follow()
    assert headered.headers() == headered.owned() and len(headered.owned()) == 11
    headered.put(ino, 2 * BLOCK_SIZE_BYTES, first_block=3)
    headered.follow()
    assert headered.headers() == headered.owned() and len(headered.owned()) == 11
    headered.set(ino, size=4 * BLOCK_SIZE_BYTES + 7)
    headered.follow()
    assert headered.headers() == headered.owned() and len(headered.owned()) == 5
    assert [b[3] for b in headered.owned().values()].count(7) == 1
    headered.remove(b"file", not_open=ino)
    headered.follow()
    assert headered.headers() == {} and headered.free_blocks == 2 * BLOCKS


def test_of_two_headers_for_one_place_the_one_committed_later_is_known(headered: Headered) -> None:
    """Even if its blocks were granted earlier than those that it replaces."""
    ino = headered.create(b"file").ino
    early: Grant = headered.do(Opcode.GRANT_BLOCKS, GrantBlocks(ANY_TIER, "", "host", 1, 1))
    headered.put(ino, BLOCK_SIZE_BYTES)
    (run,) = early.runs
    place = Location(run.region, run.block, run.generation)
    late = Extent(0, 1, BLOCK_SIZE_BYTES, BLOCK_SIZE_BYTES, (place,), b"\0" * 8)
    headered.do(Opcode.COMMIT_FILE, CommitFile(ino, (late,), (), 0, headered.clock()))
    headered.sync()
    first, second = (change for change in headered.fetch().changes if change.ino)
    assert second.block == run.block
    assert second.generation > first.generation


def test_a_freed_block_waits_until_its_header_is_clear(headered: Headered) -> None:
    ino = headered.create(b"file").ino
    headered.put(ino, 2 * BLOCKS * BLOCK_SIZE_BYTES)
    headered.follow()
    headered.remove(b"file", not_open=ino)
    assert counts(headered)["clearing_blocks"] == 2 * BLOCKS
    (tier,) = headered.do(Opcode.GET_STATISTICS, GetStatistics()).tiers
    assert tier.free_blocks == 2 * BLOCKS, "they come back by themselves"
    other = headered.create(b"other").ino
    with pytest.raises(TryAgainError, match="being cleared"):
        headered.put(other, 1)
    assert headered.fetch().changes == (), "a power cut could still bring the file back"
    headered.sync()
    page = headered.fetch()
    assert [change.ino for change in page.changes] == [0, 0] and page.complete
    with pytest.raises(TryAgainError):
        headered.put(other, 1)
    headered.apply(page)
    assert headered.fetch().changes == ()
    headered.put(other, 1)
    assert "clearing_blocks" not in counts(headered)


def test_a_reader_elsewhere_comes_first(headered: Headered) -> None:
    ino = headered.create(b"file").ino
    headered.put(ino, 3 * BLOCK_SIZE_BYTES)
    headered.follow()
    headered.driver.holders = lambda ino, client: frozenset({99})
    headered.set(ino, size=0)
    headered.follow()
    assert counts(headered)["reclaim_blocks"] == 3
    assert len(headered.headers()) == 3, "the reader may still read them"
    headered.driver.run(
        lambda txn, context: spaces.free_reclaimed(txn, context, 0, txn.state(b"next_reclaim"))
    )
    headered.driver.write_batch()
    assert counts(headered)["clearing_blocks"] == 3
    headered.follow()
    assert headered.headers() == {} and headered.free_blocks == 2 * BLOCKS


def test_what_was_never_committed_is_free_at_once(headered: Headered) -> None:
    ino = headered.create(b"file").ino
    with pytest.raises(CrailError):
        headered.put(ino, 2 * BLOCKS * BLOCK_SIZE_BYTES + 1)
    assert headered.free_blocks == 2 * BLOCKS and "header_changes" not in counts(headered)


def test_memory_has_no_log(space: NameSpace) -> None:
    space.add_storage()
    ino = space.create(b"file").ino
    space.write(ino, 5 * BLOCK_SIZE_BYTES)
    space.set(ino, size=5)
    space.remove(b"file", not_open=ino)
    assert "header_changes" not in counts(space) and space.free_blocks == 1024


def test_pages_are_in_the_order_of_what_happened(headered: Headered) -> None:
    files = [headered.create(b"%d" % number).ino for number in range(10)]
    for ino in files:
        headered.put(ino, 13 * BLOCK_SIZE_BYTES if ino != files[9] else 1)
    headered.sync()
    seen = []
    while True:
        page = headered.fetch(limit=3)
        assert page.complete == (len(page.changes) < 3)
        if not page.changes:
            break
        seen += [change.ino for change in page.changes]
        headered.apply(page)
    assert seen == sorted(seen) and set(seen) == set(files)
    assert {change[0] for change in headered.headers()} == {1, 2}, "it lies in both regions"


@pytest.mark.parametrize(
    ("server_id", "applied_sequence", "limit"),
    [(b"x" * 16, 0, 1), (b"s", 0, 1), (SERVER_ID, 1_000, 1), (SERVER_ID, 0, 0),
     (SERVER_ID, 0, HEADER_CHANGES_MAX + 1), (SERVER_ID, (1 << 64) - 1, 1),
     (SERVER_ID, -1, 1), (SERVER_ID, -5, 1)],
)  # fmt: skip
def test_impossible_questions_are_refused(
    headered: Headered, server_id: bytes, applied_sequence: int, limit: int
) -> None:
    with pytest.raises(InvalidError):
        headered.do(
            Opcode.FETCH_HEADER_CHANGES, FetchHeaderChanges(server_id, applied_sequence, limit)
        )


def test_another_server_acknowledges_nothing_here(headered: Headered) -> None:
    ino = headered.create(b"file").ino
    headered.put(ino, 3 * BLOCK_SIZE_BYTES)
    headered.set(ino, size=0)
    headered.sync()
    server = StorageServerInfo(b"o" * 16, "other", "", "", "", 0, "boot")
    info = RegionInfo(b"9" * 16, Tier.NVME, BLOCK_SIZE_BYTES, 8, True, "", keeps_headers=True)
    headered.do(Opcode.REGISTER_STORAGE, RegisterStorage(server, (info,)))
    applied = headered.driver.next_header_change - 1
    page = headered.do(Opcode.FETCH_HEADER_CHANGES, FetchHeaderChanges(server.id, applied, 9))
    assert page.changes == () and counts(headered)["clearing_blocks"] == 3


def test_a_region_cannot_lose_its_headers(headered: Headered) -> None:
    server = StorageServerInfo(SERVER_ID, "host", "", "", "", 0, "boot")
    info = RegionInfo(bytes(16), Tier.NVME, BLOCK_SIZE_BYTES, BLOCKS, True, "nvme0")
    with pytest.raises(InvalidError, match="kept headers"):
        headered.do(Opcode.REGISTER_STORAGE, RegisterStorage(server, (info,)))
    headered.register()


@pytest.mark.parametrize(
    "headers",
    [
        {"held_blocks": -1},
        {"held_blocks": 9},
        {"held_blocks": 1, "keeps_headers": False},
        {"header_sequence": -1},
        {"header_sequence": (1 << 63) + 1},
    ],
)
def test_a_region_whose_headers_cannot_be_is_refused(
    headered: Headered, headers: dict[str, int]
) -> None:
    server = StorageServerInfo(b"o" * 16, "other", "", "", "", 0, "boot")
    info = RegionInfo(b"9" * 16, Tier.NVME, BLOCK_SIZE_BYTES, 8, True, "", keeps_headers=True)
    with pytest.raises(InvalidError, match="that cannot be"):
        headered.do(Opcode.REGISTER_STORAGE, RegisterStorage(server, (replace(info, **headers),)))


def test_a_lost_region_keeps_its_log_until_it_is_back(headered: Headered) -> None:
    ino = headered.create(b"file").ino
    headered.put(ino, 3 * BLOCK_SIZE_BYTES)
    headered.follow()
    server = StorageServerInfo(SERVER_ID, "host", "", "", "", 0, "boot")
    headered.do(Opcode.REGISTER_STORAGE, RegisterStorage(server, ()))
    headered.remove(b"file", not_open=ino)
    headered.sync()
    page = headered.do(Opcode.FETCH_HEADER_CHANGES, FetchHeaderChanges(SERVER_ID, 2, 9))
    assert page.changes == ()
    assert counts(headered)["clearing_blocks"] == 3
    headered.register()
    headered.follow()
    assert headered.headers() == {} and headered.free_blocks == 2 * BLOCKS


# --- regions of another name space --------------------------------------------------------------


def loses_its_name_space(headered: Headered) -> None:
    """The same regions at a new metadata server."""
    headered.driver.close()
    shutil.rmtree(headered.state)
    headered.driver = Driver.open(config(headered.state), clock_ns=headered.clock)
    headered.register()


def test_sequences_of_a_lost_name_space_are_not_used_again(headered: Headered) -> None:
    for number in range(20):
        headered.put(headered.create(b"%d" % number).ino, 1)
    headered.follow()
    applied_before = max(store.applied_sequence for store in headered.stores)
    assert applied_before == 20
    for store in headered.stores:
        store.headers.clear()
    loses_its_name_space(headered)
    headered.open_session()
    headered.put(headered.create(b"new").ino, 1)
    headered.follow()
    assert len(headered.headers()) == 1 and headered.headers() == headered.owned()
    assert max(store.applied_sequence for store in headered.stores) > applied_before


def test_a_region_with_blocks_of_another_name_space_is_left_alone(headered: Headered) -> None:
    ino = headered.create(b"file").ino
    headered.put(ino, 3 * BLOCK_SIZE_BYTES)
    headered.follow()
    before = headered.headers()
    loses_its_name_space(headered)
    headered.register()
    headered.open_session()
    regions = headered.do(Opcode.GET_CLUSTER_MAP, GetClusterMap()).regions
    held = {placed.id for placed in regions if placed.unclaimed}
    assert held == {region for region, _ in before}
    other = headered.create(b"new").ino
    headered.put(other, BLOCKS * BLOCK_SIZE_BYTES)
    with pytest.raises(NoSpaceError):
        headered.put(other, 1, first_block=BLOCKS)
    headered.follow()
    assert {place: headered.headers()[place] for place in before} == before
    headered.assert_sound()

    headered.do(Opcode.END_SALVAGE, EndSalvage(tuple(held)))
    headered.assert_sound()
    with pytest.raises(TryAgainError):
        headered.put(other, 1, first_block=BLOCKS)
    headered.follow()
    headered.put(other, 1, first_block=BLOCKS)
    headered.do(Opcode.END_SALVAGE, EndSalvage(tuple(held)))
    headered.follow()
    assert headered.headers() == headered.owned()


def test_a_state_of_version_1_is_brought_up_to_date(space: NameSpace) -> None:
    ino = space.create(b"file").ino

    def as_before(txn, _):  # type: ignore[no-untyped-def]
        for key in (b"next_header_change", b"salvaging"):
            txn.delete(schema.STATE, key)
        txn.set_state(b"format_version", 1)

    space.driver.run(as_before)
    driver = space.driver
    driver.checkpoint()
    driver._txn.abort()
    with driver._state.begin() as transaction:
        transaction.drop(driver._state.handles[schema.HEADER_LOG], delete=True)
    driver._state.close()
    assert schema.HEADER_LOG in state_directory._SINCE_VERSION_2
    space.driver = Driver.open(config(space.state), clock_ns=space.clock)
    assert space.attributes(ino).ino == ino
    assert space.driver.next_header_change == 1
    space.reopen()


# --- crashes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_whoever_dies_whenever_headers_end_up_right(headered: Headered, seed: int) -> None:
    """Fault model: the metadata server is killed between answers, or a power cut takes what it has
    not synced; the storage server dies before, in the middle of and after applying a page."""
    print("seed", seed)
    dice = random.Random(seed)
    files: dict[int, bytes] = {}
    pages = []
    for step in range(250):
        match dice.choice(["put", "put", "put", "cut", "remove", "follow", "follow", "die"]):
            case "put":
                name = b"%d" % dice.randrange(8)
                ino = headered.create(name, exclusive=False).ino
                files[ino] = name
                try:
                    headered.put(ino, dice.randint(1, 50_000), dice.randrange(10))
                except TryAgainError:
                    headered.sync()
                except NoSpaceError:
                    headered.set(ino, size=0)
            case "cut" if files:
                headered.set(dice.choice(list(files)), size=dice.randrange(60_000))
            case "remove" if files:
                ino, name = dice.choice(list(files.items()))
                del files[ino]
                headered.remove(name, not_open=ino)
            case "follow":
                if dice.random() < 0.5:
                    headered.sync()
                page = headered.fetch(dice.randint(1, 20))
                pages.append(page)
                fate = dice.random()
                if fate < 0.7:
                    headered.apply(page)
                elif fate < 0.85:
                    headered.apply(page, regions=1)
                    headered.register()
                else:
                    headered.register()
            case "die":
                headered.kill(power_cut=dice.random() < 0.5)
                files = {node.attributes.ino: node.name for node in headered.page(1).entries}
        assert not headered.headers().keys() & headered.writable(), (
            f"step {step}: a header names a block that somebody may write to"
        )
        if step % 10 == 0:
            headered.assert_sound()
    headered.follow()
    assert headered.headers() == headered.owned()
    assert sum(len(page.changes) for page in pages) > 50
