"""A name space whose regions keep headers, and a storage server that follows them on demand."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import xxhash

from crailfs.errors import CrailError
from crailfs.limits import HEADER_CHANGES_MAX
from crailfs.records import (
    ANY_TIER,
    Extent,
    Location,
    RegionInfo,
    Run,
    StorageServerInfo,
    Tier,
)
from crailfs.wire.messages import (
    CommitFile,
    FetchHeaderChanges,
    Grant,
    GrantBlocks,
    HeaderChanges,
    Opcode,
    RegionState,
    RegisterStorage,
    ReturnBlocks,
    StorageHeartbeat,
)
from metadata_server import schema, sessions
from metadata_server.driver import Driver
from metadata_server.txn import Txn
from storage_server.media.headers import HeaderStore
from tests.metadata.name_space import BLOCK_SIZE_BYTES, SERVER_ID, NameSpace, config
from tests.support.headers import MemoryHeaders

BLOCKS = 64

Blocks = dict[tuple[int, int], tuple[int, int, int, int, int]]
"""(region, block) -> inode, file block, stored bytes, visible bytes, checksum."""


class Headered(NameSpace):
    """One storage server with two NVMe regions of ``BLOCKS`` blocks each, whose headers are in
    memory or in ``stores``."""

    def __init__(self, state: Path, stores: Sequence[HeaderStore] = ()) -> None:
        super().__init__(state)
        self._synced = state.with_name("synced")
        self.stores = stores or [MemoryHeaders(BLOCKS, BLOCK_SIZE_BYTES) for _ in range(2)]
        self.register()
        self.applied_sequence = 0
        self.open_session()
        self.sync()

    def open_session(self) -> None:
        self.driver.run(lambda txn, _: sessions.open_session(txn, self.client_id, "host"))
        self.driver.write_batch()

    def register(self) -> None:
        """As a storage server does that starts."""
        infos = tuple(
            RegionInfo(
                bytes([number]) * 16,
                Tier.NVME,
                BLOCK_SIZE_BYTES,
                BLOCKS,
                True,
                f"nvme{number}",
                keeps_headers=True,
                held_blocks=store.held_blocks,
                header_sequence=store.applied_sequence,
            )
            for number, store in enumerate(self.stores)
        )
        server = StorageServerInfo(SERVER_ID, "host", "", "", "", 0, "boot")
        ids = self.do(Opcode.REGISTER_STORAGE, RegisterStorage(server, infos)).region_ids
        self.by_region = dict(zip(ids, self.stores, strict=True))
        states = tuple(RegionState(region_id, BLOCKS, ()) for region_id in ids)
        self.do(Opcode.STORAGE_HEARTBEAT, StorageHeartbeat(SERVER_ID, states, ()))
        self.applied_sequence = min(store.applied_sequence for store in self.stores)

    def sync(self) -> None:
        """What the metadata server does once a second."""
        self.driver.sync_journal()
        shutil.rmtree(self._synced, ignore_errors=True)
        shutil.copytree(self.state, self._synced)
        self.driver.synced_header_changes = self.driver.next_header_change

    def fetch(self, limit: int = HEADER_CHANGES_MAX) -> HeaderChanges:
        """Acknowledges what is applied, too."""
        page: HeaderChanges = self.do(
            Opcode.FETCH_HEADER_CHANGES,
            FetchHeaderChanges(SERVER_ID, self.applied_sequence, limit),
        )
        return page

    def apply(self, page: HeaderChanges, *, regions: int = 2) -> None:
        """In the first ``regions`` regions only: the server dies in between."""
        if not page.changes:
            return
        for region, store in list(self.by_region.items())[:regions]:
            of_region = [change for change in page.changes if change.region == region]
            if of_region and store.applied_sequence < page.last_sequence:
                store.apply(of_region, page.last_sequence)
        if regions == len(self.stores):
            self.applied_sequence = page.last_sequence

    def follow(self) -> None:
        """Until the headers say what the name space says, and that is acknowledged."""
        self.sync()
        while True:
            page = self.fetch()
            self.apply(page)
            if not page.changes:
                return

    def kill(self, *, power_cut: bool = False) -> None:
        """The metadata server, after its last answer; it starts again. The power cut takes all
        that came after the last ``sync``."""
        self.driver._txn.abort()
        self.driver._state.close()
        if power_cut:
            shutil.rmtree(self.state)
            shutil.copytree(self._synced, self.state)
        self.driver = Driver.open(config(self.state), clock_ns=self.clock)
        self.sync()

    # --- data -----------------------------------------------------------------------------------

    def put(self, ino: int, size_bytes: int, first_block: int = 0) -> None:
        """Commit so many bytes from ``first_block`` on, with checksums of their own, in as many
        runs as the space is in. Raises what granting does."""
        block_count = -(-size_bytes // BLOCK_SIZE_BYTES)
        runs: list[Run] = []
        missing = block_count
        try:
            while missing:
                request = GrantBlocks(ANY_TIER, "", "host", missing, 1)
                granted: Grant = self.do(Opcode.GRANT_BLOCKS, request)
                runs += granted.runs
                missing -= sum(run.block_count for run in granted.runs)
        except CrailError:
            self.do(Opcode.RETURN_BLOCKS, ReturnBlocks(tuple(runs)))
            raise
        extents, file_block = [], first_block
        for run in runs:
            end = file_block + run.block_count
            is_last = end == first_block + block_count
            tail_bytes = size_bytes - (block_count - 1) * BLOCK_SIZE_BYTES
            stored_bytes = tail_bytes if is_last else BLOCK_SIZE_BYTES
            checksums = b"".join(
                xxhash.xxh3_64_digest(b"%d %d %d" % (ino, block, run.generation))
                for block in range(file_block, end)
            )
            place = Location(run.region, run.block, run.generation)
            extents.append(
                Extent(file_block, run.block_count, stored_bytes, stored_bytes, (place,), checksums)
            )
            file_block = end
        end_bytes = first_block * BLOCK_SIZE_BYTES + size_bytes
        self.do(Opcode.COMMIT_FILE, CommitFile(ino, tuple(extents), (), end_bytes, self.clock()))

    # --- what is to be true ---------------------------------------------------------------------

    def owned(self) -> Blocks:
        """As the name space has it."""

        def collect(txn: Txn, _: object) -> Blocks:
            found: Blocks = {}
            for key, value in txn.scan(schema.EXTENTS):
                ino = schema.unpack_ino_block(key)[0]
                extent = schema.decode_extent(value)
                place = extent.replicas[0]
                for index in range(extent.block_count):
                    is_last = index == extent.block_count - 1
                    found[place.region, place.block + index] = (
                        ino,
                        extent.file_block + index,
                        extent.tail_stored_bytes if is_last else BLOCK_SIZE_BYTES,
                        extent.tail_visible_bytes if is_last else BLOCK_SIZE_BYTES,
                        int.from_bytes(extent.checksums[8 * index : 8 * index + 8], "little"),
                    )
            return found

        return self.driver.run(collect)

    def headers(self) -> Blocks:
        """As the regions have it."""
        return {
            (region, header.block): (
                header.ino,
                header.file_block,
                header.stored_bytes,
                header.visible_bytes,
                header.checksum,
            )
            for region, store in self.by_region.items()
            for header in store.read(0, BLOCKS)[0]
        }

    def writable(self) -> set[tuple[int, int]]:
        """Blocks that are free or granted: somebody may write there."""

        def collect(txn: Txn, _: object) -> set[tuple[int, int]]:
            rows = [
                (*schema.unpack_region_block(key), schema.unpack_u64(value))
                for key, value in txn.scan(schema.FREE)
            ]
            for key, value in txn.scan(schema.GRANTS):
                _, region, block = schema.unpack_owner_region_block(key)
                rows.append((region, block, schema.decode_granted(value).block_count))
            return {(region, block + i) for region, block, count in rows for i in range(count)}

        return self.driver.run(collect)
