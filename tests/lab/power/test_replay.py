"""What a power cut leaves of a region when the medium loses everything that was not flushed.

Killing QEMU cannot show that: its host keeps the writes that the guest never flushed. Here a
region's device is recorded (see ``write_log``) while files are written and synced. Then its states
are made again: at flushes, and between two flushes with some of the writes in between, some of them
torn. From each the region opens, every block that its headers say is some file's has the bytes of
its checksum, and it has not fallen back behind an earlier state. And whenever an fsync had
returned, every block of that file is there.

Persistent memory is recorded as a file on ext4, whose flushes are msync: libpmemobj and the medium
persist in the same order and places as with DAX, by another means and a page at a time. What this
does not show is a missing cache-line flush.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import trio
from xxhash import xxh3_64_intdigest

import metadata_server.server
import storage_server.server
from crailfs.client.store import CrailStore
from crailfs.config import ClientConfig, Credentials, MetadataConfig, RegionConfig, StorageConfig
from crailfs.limits import BLOCK_SIZE_DEFAULT_BYTES
from crailfs.records import Tier
from crailfs.units import MIB
from storage_server.media import Medium
from tests.lab.power import write_log
from tests.lab.power.devices import add_part
from tests.support.history import History, Step
from tests.support.history_load import make_directories, perform
from tests.support.region_audit import OwnedBlock, check_headers, open_offline, owned_by

SEED = int(os.environ.get("CRAIL_TEST_SEED", "20261205"))
DEVICE_BYTES = 64 * MIB
LOG_BYTES = 640 * MIB
PMEM_REGION_BYTES = 16 * MIB
DURABLE_STEPS = 12
ATOM_BYTES = {Tier.NVME: write_log.SECTOR_BYTES, Tier.PMEM: 4096}
"""What is never torn itself. ext4 does not mount with half a superblock, and asks disks for more
than their sectors."""
STATES = 24
"""That are made again, besides those after each durable step; half of them between flushes."""
MOUNTPOINT = Path("/run/recorded")


class Promise(NamedTuple):
    """What an fsync that returned says of one file."""

    mark: str
    blocks: list[OwnedBlock]


class Recorded(NamedTuple):
    initial: bytes
    entries: list[write_log.Entry]
    promises: list[Promise]
    cluster_id: bytes


@pytest.fixture(scope="session")
def parts(nvme: Path) -> Iterator[tuple[Path, Path]]:
    """A part of the disk to record, and one for the log."""
    found = []
    for number, (start, length) in enumerate(
        ((MIB, DEVICE_BYTES), (MIB + DEVICE_BYTES, LOG_BYTES)), 1
    ):
        path = Path(f"{nvme}p{number}")
        if not path.exists():
            add_part(nvme, number, start, length)
        found.append(path)
    yield found[0], found[1]


@pytest.mark.timeout(400)
@pytest.mark.parametrize("tier", [Tier.NVME, Tier.PMEM])
async def test_every_state_that_a_power_cut_may_leave(
    tier: Tier, parts: tuple[Path, Path], tmp_path: Path
) -> None:
    print(f"seed {SEED}")
    choose = random.Random(f"{SEED}/{tier}")
    recorded = await _record(tier, *parts, tmp_path)
    replay = write_log.Replay(recorded.initial, recorded.entries)
    promises = {promise.mark: promise for promise in recorded.promises}
    made = next(i for i, entry in enumerate(recorded.entries, 1) if entry.mark == "made")
    boundaries = [position for position in replay.boundaries if position >= made]
    chosen = set(choose.sample(boundaries, min(STATES, len(boundaries))))
    states = torn = blocks = 0
    sequence = 0
    for position in boundaries:
        promise = promises.get(replay.mark_at(position))
        if promise is None and position not in chosen:
            continue
        replay.run_to(position)
        found = await _check(tier, recorded.cluster_id, replay.content, tmp_path, promise)
        assert found.applied_sequence >= sequence
        sequence = found.applied_sequence
        states += 1
        blocks += found.headers
        if promise is None and choose.random() < 0.5:
            content = replay.torn(choose, ATOM_BYTES[tier])
            found = await _check(tier, recorded.cluster_id, content, tmp_path, None)
            assert found.applied_sequence >= sequence
            torn += 1
    assert blocks > 0
    print(
        f"{len(recorded.entries)} writes and flushes; {states} states at flushes and {torn} "
        f"between, {blocks} blocks in them, {len(promises)} files that had been synced"
    )


# --- recording ----------------------------------------------------------------------------------


async def _record(tier: Tier, device: Path, log: Path, directory: Path) -> Recorded:
    initial = write_log.read_device(device)
    recorder = write_log.Recorder(device, log)
    promises: list[Promise] = []
    with ExitStack() as ending:
        if tier is Tier.PMEM:
            write_log.make_file_system(recorder.path)
            write_log.mount(recorder.path, MOUNTPOINT)
            ending.callback(write_log.unmount, MOUNTPOINT)
        async with trio.open_nursery() as nursery, AsyncExitStack() as stack:
            metadata = MetadataConfig(
                state=directory / "metadata",
                listen=(f"unix:{directory}/metadata.sock",),
                credentials=Credentials(cluster_id=b"", secret=b"the secret of a test cluster"),
            )
            storage = StorageConfig(
                state=directory / "storage",
                metadata=metadata.listen[0],
                listen=(f"unix:{directory}/storage.sock",),
                regions=(_region(tier, recorder.path),),
                credentials=metadata.credentials,
            )
            await nursery.start(partial(metadata_server.server.serve, metadata))
            await nursery.start(storage_server.server.serve, storage)
            config = ClientConfig(
                metadata=metadata.listen[0], credentials=metadata.credentials, transports=("local",)
            )
            store = await stack.enter_async_context(CrailStore.connect(config))
            cluster_id = (await store.filesystem.cluster_map()).cluster_id
            recorder.mark("made")
            await _load(store, config, tier, recorder, promises)
            await stack.aclose()
            nursery.cancel_scope.cancel()
    return Recorded(initial, recorder.close(), promises, cluster_id)


async def _load(
    store: CrailStore,
    config: ClientConfig,
    tier: Tier,
    recorder: write_log.Recorder,
    promises: list[Promise],
) -> None:
    await make_directories(store, "load", {"files": tier.name.lower()})
    history = History(f"{SEED}", ("files",), BLOCK_SIZE_DEFAULT_BYTES)
    last: list[Step] = []

    def acknowledge(step: Step) -> bool:
        last[:] = [step]
        return not step.is_durable

    for number in range(DURABLE_STEPS):
        await perform(store, "load", history, acknowledge)
        ino = (await store.lookup(f"load/{last[0].name}")).ino
        promises.append(Promise(f"synced-{number}", await owned_by(store.filesystem, config, ino)))
        await trio.to_thread.run_sync(recorder.mark, promises[-1].mark)


def _region(tier: Tier, device: Path) -> RegionConfig:
    if tier is Tier.PMEM:
        return RegionConfig(tier=tier, path=MOUNTPOINT / "pool", size_bytes=PMEM_REGION_BYTES)
    return RegionConfig(tier=tier, path=device, size_bytes=0)


# --- checking -----------------------------------------------------------------------------------


class Found(NamedTuple):
    headers: int
    applied_sequence: int


async def _check(
    tier: Tier, cluster_id: bytes, content: bytearray, directory: Path, promise: Promise | None
) -> Found:
    with write_log.LoopDevice(content, directory / "state.img") as device, ExitStack() as ending:
        if tier is Tier.PMEM:
            write_log.mount(device, MOUNTPOINT)
            ending.callback(write_log.unmount, MOUNTPOINT, wait=False)
        return await _check_region(_region(tier, device), cluster_id, promise)


async def _check_region(region: RegionConfig, cluster_id: bytes, promise: Promise | None) -> Found:
    medium = await open_offline(region, cluster_id, BLOCK_SIZE_DEFAULT_BYTES)
    assert medium is not None
    try:
        assert medium.headers is not None
        count = await check_headers(medium)
        if promise is not None:
            await _check_promise(medium, promise)
        return Found(count, medium.headers.applied_sequence)
    finally:
        medium.close()


async def _check_promise(medium: Medium, promise: Promise) -> None:
    for _, header in promise.blocks:
        stored = memoryview(bytearray(header.stored_bytes))
        await medium.read(header.block * medium.superblock.block_size_bytes, stored)
        assert xxh3_64_intdigest(stored) == header.checksum, f"{promise.mark}: lost {header}"
