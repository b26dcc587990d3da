"""Writes blocks and applies their headers until it is killed: what a server and its clients do.

Run as a program with the region's path, the seed and the number of headers in a transaction. What
happens in each batch follows from the seed alone, so a process that takes over at any sequence, and
the test that looks at what is left, know what must be there.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import xxhash

from crailfs.config import RegionConfig
from crailfs.records import BlockHeader, HeaderChange, Tier
from crailfs.units import KIB, MIB
from storage_server.media import pmem_format, pmem_headers
from storage_server.media.pmem import PmemMedium

BLOCK = 4 * KIB
CONFIG_BYTES = 6 * MIB
SEGMENT_BYTES = 2 * MIB
BLOCK_COUNT = CONFIG_BYTES // BLOCK
RUN_BLOCKS_MAX = 70


def open_region(path: Path, known: bytes | None = None) -> PmemMedium:
    config = RegionConfig(tier=Tier.PMEM, path=path, size_bytes=CONFIG_BYTES)
    return PmemMedium.open(config, cluster_id=b"c" * 16, block_size_bytes=BLOCK, known_uuid=known)


def content(generation: int, index: int, byte_count: int) -> bytes:
    return ((generation << 16 | index).to_bytes(8, "little") * (BLOCK // 8))[:byte_count]


class Batches:
    """``headers`` is what the region holds after the batches so far."""

    def __init__(self, seed: int) -> None:
        self._choose = random.Random(seed)
        self.headers: dict[int, BlockHeader] = {}
        self._runs: dict[int, tuple[int, int]] = {}
        self.sequence = 0
        self._next = 1

    def next(self) -> tuple[list[HeaderChange], list[tuple[int, bytes]]]:
        """The next batch's changes, and the bytes that blocks get before they are published. Blocks
        that it frees are written again only in a later batch, when their header is gone."""
        self.sequence += 1
        busy = set(self.headers)
        changes: list[HeaderChange] = []
        writes: list[tuple[int, bytes]] = []
        for ino in self._choose.sample(sorted(self._runs), min(len(self._runs), 2)):
            if len(busy) > BLOCK_COUNT // 2 or self._choose.random() < 0.3:
                first, count = self._runs.pop(ino)
                changes.append(HeaderChange(1, first, count, 0))
                for block in range(first, first + count):
                    del self.headers[block]
        for _ in range(self._choose.randrange(1, 4)):
            count = self._choose.randrange(1, RUN_BLOCKS_MAX)
            first = self._choose.randrange(BLOCK_COUNT - count)
            if busy.isdisjoint(range(first, first + count)):
                busy.update(range(first, first + count))
                changes.append(self._publish(first, count, writes))
        return changes, writes

    def _publish(self, first: int, count: int, writes: list[tuple[int, bytes]]) -> HeaderChange:
        generation = self._next
        self._next += 1
        ino = generation + 1000
        tail_bytes = self._choose.randrange(1, BLOCK + 1)
        checksums = b""
        for index in range(count):
            stored_bytes = BLOCK if index < count - 1 else tail_bytes
            data = content(generation, index, stored_bytes)
            checksum = xxhash.xxh3_64_intdigest(data)
            checksums += checksum.to_bytes(8, "little")
            writes.append((first + index, data))
            self.headers[first + index] = BlockHeader(
                first + index, ino, index, generation, stored_bytes, stored_bytes, checksum
            )
        self._runs[ino] = (first, count)
        return HeaderChange(1, first, count, ino, 0, generation, tail_bytes, tail_bytes, checksums)


def main(path: Path, seed: int, transaction_headers: int) -> None:
    pmem_format.SEGMENT_BYTES = SEGMENT_BYTES  # type: ignore[misc]
    pmem_headers.TRANSACTION_HEADERS_MAX = transaction_headers  # type: ignore[misc]
    medium = open_region(path)
    assert medium.blocks is not None
    batches = Batches(seed)
    while batches.sequence < medium.headers.applied_sequence:
        batches.next()
    while True:
        changes, writes = batches.next()
        for block, data in writes:
            medium.blocks[block * BLOCK : block * BLOCK + len(data)] = data
        medium.headers.apply(changes, batches.sequence)
        print(batches.sequence, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
