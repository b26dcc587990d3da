"""Regions' headers follow the metadata server's word, whichever of the two dies, and when."""

from __future__ import annotations

import contextlib
import errno
import random
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import trio

from crailfs.config import RegionConfig
from crailfs.errors import (
    CrailError,
    DamagedError,
    InvalidError,
    NotPermittedError,
    NotSupportedError,
    ProtocolError,
)
from crailfs.limits import HEADER_PAGE_MAX
from crailfs.net.client import RpcClient
from crailfs.pmem import libpmem, libpmemobj
from crailfs.records import HeaderChange, Tier
from crailfs.units import MIB
from crailfs.wire.messages import (
    FetchHeaderChanges,
    GetClusterMap,
    HeaderChanges,
    Opcode,
    ReadHeaders,
    Role,
)
from storage_server import header_follower
from storage_server.fencing import Fencing
from storage_server.header_follower import HeaderFollower
from storage_server.media import Medium, open_medium
from storage_server.media.nvme_headers import HeaderTable
from storage_server.region import Region
from storage_server.services import Services
from tests.metadata.headers import BLOCKS, Headered
from tests.metadata.name_space import BLOCK_SIZE_BYTES, SERVER_ID
from tests.salvage.cluster import create, salvage_cluster, write

_without_pmem = libpmem.missing() or libpmemobj.missing()
TIERS = [
    Tier.NVME,
    pytest.param(
        Tier.PMEM, marks=pytest.mark.skipif(_without_pmem is not None, reason=str(_without_pmem))
    ),
]
REGION_BYTES = BLOCKS * BLOCK_SIZE_BYTES


class Death(Exception):  # noqa: N818 - of the storage server
    pass


class Rig:
    """A metadata server's driver and a storage server's follower over two real media."""

    def __init__(self, directory: Path, tier: Tier, work: trio.Nursery) -> None:
        self.configs = [
            RegionConfig(tier=tier, path=directory / f"region-{number}", size_bytes=REGION_BYTES)
            for number in range(2)
        ]
        self.media = self._open()
        self.services = Services(Fencing(directory), work)
        self.space = Headered(directory / "metadata", [m.headers for m in self.media])  # type: ignore[misc]
        self.before_apply = self.after_apply = lambda: None
        self.fetch_limit = 2_048
        self.start()

    def _open(self) -> list[Medium]:
        return [
            open_medium(
                config, cluster_id=b"c" * 16, block_size_bytes=BLOCK_SIZE_BYTES, known_uuid=None
            )
            for config in self.configs
        ]

    def start(self) -> None:
        self.regions = [Region(medium) for medium in self.media]
        for region, region_id in zip(self.regions, self.space.by_region, strict=True):
            region.region_id = region_id
            region.apply_headers = self._deadly(region.apply_headers)  # type: ignore[method-assign]
        self.follower = HeaderFollower(self, SERVER_ID, self.regions, self.services)  # type: ignore[arg-type]

    def _deadly(self, apply: Any) -> Any:
        async def apply_headers(changes: Sequence[HeaderChange], last_sequence: int) -> None:
            self.before_apply()
            assert last_sequence >= apply.__self__.header_sequence, "headers go back in time"
            await apply(changes, last_sequence)
            self.after_apply()

        return apply_headers

    def restart(self) -> None:
        """The storage server: all that it has in memory is gone."""
        self.close()
        self.media = self._open()
        self.space.stores = [medium.headers for medium in self.media]  # type: ignore[misc]
        self.space.register()
        self.start()

    def close(self) -> None:
        for medium in self.media:
            medium.close()

    async def call(self, opcode: Opcode, request: FetchHeaderChanges, **_: object) -> HeaderChanges:
        """As ``RpcClient.call``, to the driver."""
        await trio.lowlevel.checkpoint()
        limited = FetchHeaderChanges(
            request.server_id, request.applied_sequence, min(request.change_limit, self.fetch_limit)
        )
        reply: HeaderChanges = self.space.do(opcode, limited)
        return reply

    async def follow(self) -> None:
        self.before_apply = self.after_apply = lambda: None
        self.space.sync()
        while (await self.follower.step()).changes:
            pass


@contextlib.asynccontextmanager
async def rigged(directory: Path, tier: Tier) -> AsyncIterator[Rig]:
    async with trio.open_nursery() as work:
        rig = Rig(directory, tier, work)
        yield rig
        rig.space.assert_sound()
        rig.space.driver.close()
        rig.close()
        work.cancel_scope.cancel()


def die() -> None:
    raise Death


def dies_after(count: int) -> Callable[[], None]:
    """Lets so many pass."""

    def die_later() -> None:
        nonlocal count
        count -= 1
        if count < 0:
            raise Death

    return die_later


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("tier", TIERS)
async def test_whoever_dies_whenever(tmp_path: Path, tier: Tier, seed: int) -> None:
    """Fault model: the storage server dies before or after any region's headers are changed, or
    before it acknowledges; the metadata server is killed, with or without a power cut."""
    print("seed", seed)
    dice = random.Random(seed)
    deaths = 0
    async with rigged(tmp_path, tier) as rig:
        space = rig.space
        for step in range(120):
            name = b"%d" % dice.randrange(6)
            match dice.choice(["put", "put", "cut", "remove", "follow", "follow", "kill"]):
                case "put":
                    ino = space.create(name, exclusive=False).ino
                    with contextlib.suppress(CrailError):
                        space.put(ino, dice.randint(1, 50_000), dice.randrange(8))
                case "cut":
                    ino = space.create(name, exclusive=False).ino
                    space.set(ino, size=dice.randrange(40_000))
                case "remove" if name in space.names():
                    space.remove(name, not_open=space.lookup(1, name).ino)
                case "follow":
                    space.sync()
                    rig.fetch_limit = dice.randint(1, 12)
                    rig.before_apply = dies_after(dice.randint(0, 9))
                    rig.after_apply = dies_after(dice.randint(0, 9))
                    try:
                        for _ in range(dice.randint(1, 4)):
                            await rig.follower.step()
                        if dice.random() < 0.2:
                            rig.restart()
                    except Death:
                        deaths += 1
                        rig.restart()
                case "kill":
                    space.kill(power_cut=dice.random() < 0.5)
            assert not space.headers().keys() & space.writable(), f"step {step}"
        await rig.follow()
        assert space.headers() == space.owned()
        rig.restart()
        assert space.headers() == space.owned()
        assert not any(
            placed.unclaimed for placed in space.do(Opcode.GET_CLUSTER_MAP, GetClusterMap()).regions
        )
    assert deaths > 3


@pytest.mark.parametrize("tier", TIERS)
async def test_a_block_is_never_in_neither_of_two_regions(tmp_path: Path, tier: Tier) -> None:
    """A file's block is rewritten into the other region, and the storage server dies with the
    first change of headers that it makes: the metadata server's state may be lost with it."""
    async with rigged(tmp_path, tier) as rig:
        space = rig.space
        ino = space.create(b"file").ino
        await rig.follow()
        for round_number in range(6):
            # So that the region which loses the blocks has the first change.
            space.set(ino, size=max(0, space.attributes(ino).size - 1))
            space.put(ino, 3 * BLOCK_SIZE_BYTES)
            space.sync()
            rig.after_apply = die
            with contextlib.suppress(Death):
                await rig.follower.step()
            rig.restart()
            # The first time everything is in one region.
            kept = {header[1] for header in space.headers().values()}
            assert kept == {0, 1, 2} or not round_number
            await rig.follow()


async def test_freed_blocks_are_discarded_before_they_are_used_again(tmp_path: Path) -> None:
    async with rigged(tmp_path, Tier.NVME) as rig:
        space = rig.space
        ino = space.create(b"file").ino
        space.put(ino, 2 * REGION_BYTES)
        await rig.follow()
        discarded = []

        async def discard(first_block: int, block_count: int) -> None:
            assert space.free_blocks == 0
            discarded.append(block_count)

        for medium in rig.media:
            medium.discard = discard
        space.set(ino, size=0)
        await rig.follow()
        assert sum(discarded) == 2 * BLOCKS == space.free_blocks
        assert rig.services.counters["blocks_discarded"] == 2 * BLOCKS


async def test_blocks_come_free_though_the_device_refuses_discards(tmp_path: Path) -> None:
    async with rigged(tmp_path, Tier.NVME) as rig:
        space = rig.space

        async def refuse(first_block: int, block_count: int) -> None:
            raise OSError(errno.EREMOTEIO, "Remote I/O error")

        for medium in rig.media:
            medium.discard = refuse  # type: ignore[method-assign]
        space.put(space.create(b"file").ino, 50_000)
        free_blocks = space.free_blocks
        space.remove(b"file", not_open=space.lookup(1, b"file").ino)
        await rig.follow()
        assert space.free_blocks > free_blocks
        assert rig.services.counters["discard_errors"] > 0


async def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    async with rigged(tmp_path, Tier.NVME) as rig:
        region_id = rig.regions[0].region_id
        for change in (
            HeaderChange(77, 0, 1, 0),
            HeaderChange(region_id, BLOCKS - 1, 2, 0),
            HeaderChange(region_id, -1, 2, 0),
            HeaderChange(region_id, 3, 0, 0),
        ):

            async def call(*_: object, change: HeaderChange = change, **__: object) -> object:
                return HeaderChanges((change,), 5, True)

            rig.call = call
            with pytest.raises(ProtocolError):
                await rig.follower.step()
        assert rig.regions[0].header_sequence == 0


async def test_a_failing_device_is_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(header_follower, "IDLE_INTERVAL_S", 0.01)
    async with rigged(tmp_path, Tier.NVME) as rig:
        space = rig.space
        space.put(space.create(b"file").ino, 5)
        space.sync()
        failures = 4

        def fail() -> None:
            nonlocal failures
            if failures:
                failures -= 1
                raise OSError(5, "Input/output error")

        followed = trio.Event()
        rig.before_apply, rig.after_apply = fail, followed.set
        async with trio.open_nursery() as nursery:
            nursery.start_soon(rig.follower.run)
            with trio.fail_after(10):
                await followed.wait()
            nursery.cancel_scope.cancel()
        assert space.headers() == space.owned() and len(space.owned()) == 1
        assert caplog.text.count("block headers cannot be written") == 1
        assert rig.services.counters["header_errors"] == 4


async def test_headers_are_for_operators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with salvage_cluster(tmp_path, Tier.NVME, Tier.DISK, region_bytes=16 * MIB) as cluster:
        async with cluster.client() as fs:
            ino = await create(fs, b"file")
            await write(fs, ino, (0, b"x" * 200_000))
        await cluster.headers_followed()
        ids = {placed.info.tier: placed.id for placed in (await cluster.status()).cluster.regions}
        nvme, disk = ids[Tier.NVME], ids[Tier.DISK]
        async with trio.open_nursery() as nursery:
            operator, client = (
                RpcClient(
                    cluster.storage_config.listen[0],
                    cluster.storage_config.credentials,
                    role=role,
                    client_id=99 + role,
                )
                for role in (Role.OPERATOR, Role.CLIENT)
            )
            await nursery.start(operator.run)
            await nursery.start(client.run)
            page: Any = await operator.call(Opcode.READ_HEADERS, ReadHeaders(nvme, 0, 2))
            assert [header.ino for header in page.headers] == [ino, ino]
            assert [header.file_block for header in page.headers] == [0, 1]
            rest: Any = await operator.call(
                Opcode.READ_HEADERS, ReadHeaders(nvme, page.next_block, HEADER_PAGE_MAX)
            )
            assert [header.visible_bytes for header in rest.headers] == [
                65_536,
                200_000 - 3 * 65_536,
            ]
            assert rest.next_block == 16 * MIB // 65_536
            for error, request, caller in (
                (NotPermittedError, ReadHeaders(nvme, 0, 1), client),
                (NotSupportedError, ReadHeaders(disk, 0, 1), operator),
                (InvalidError, ReadHeaders(nvme, 0, HEADER_PAGE_MAX + 1), operator),
                (InvalidError, ReadHeaders(nvme, 1_000_000, 1), operator),
            ):
                with pytest.raises(error):
                    await caller.call(Opcode.READ_HEADERS, request)

            def fail(*_: object) -> object:
                raise OSError(5, "Input/output error")

            monkeypatch.setattr(HeaderTable, "read", fail)
            with pytest.raises(DamagedError, match="reading its block headers: Input/output error"):
                await operator.call(Opcode.READ_HEADERS, ReadHeaders(nvme, 0, 1))
            nursery.cancel_scope.cancel()
