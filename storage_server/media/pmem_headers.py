"""The block headers of a region in persistent memory, changed in libpmemobj's transactions."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, Protocol

from crailfs.errors import DamagedError
from crailfs.pmem.libpmemobj import Pool
from crailfs.records import BlockHeader, HeaderChange
from storage_server.media import pmem_format as form
from storage_server.media.headers import check_change
from storage_server.media.superblock import Superblock

TRANSACTION_HEADERS_MAX: Final = 1024
"""64 KiB of old headers to note: what libpmemobj logs without asking its heap for much room."""
_SCAN_HEADERS: Final = 1024


class MakeDurable(Protocol):
    def __call__(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Offset and length of bytes of blocks."""


class PmemHeaders:
    """See ``HeaderStore``. A batch's headers change in several transactions, the applied sequence
    in the last: a batch that was cut off is applied again from its beginning. A header never goes
    back to an older state, because a batch is first reduced to what each block ends as."""

    def __init__(
        self,
        path: Path,
        pool: Pool,
        superblock: Superblock,
        root: int,
        directory: form.Directory,
        make_durable: MakeDurable,
    ) -> None:
        """Raises ``DamagedError`` if the state does not check."""
        self._path = path
        self._pool: Pool | None = pool
        self._superblock = superblock
        self._state_at = root + form.STATE_OFFSET
        self._header_offsets = directory.header_offsets
        self._blocks_per_segment = directory.segment_bytes // superblock.block_size_bytes
        self._make_durable = make_durable
        self._lock = threading.Lock()
        state = form.decode_state(pool.read(self._state_at, form.STATE_BYTES))
        if state is None or state[1] > superblock.block_count:
            raise DamagedError(
                f"region {path}: its record of applied changes is damaged. Restore the region, or "
                "take it out of the configuration: the files that had blocks in it lose them"
            )
        self.applied_sequence, self.held_blocks = state

    def apply(self, changes: Sequence[HeaderChange], last_sequence: int) -> None:
        with self._lock:
            pool = self._opened()
            if last_sequence < self.applied_sequence:
                return
            final = self._reduce(changes)
            ordered = sorted(final)
            used = [block for block in ordered if final[block] != form.FREE_HEADER]
            size = self._superblock.block_size_bytes
            self._make_durable([(first * size, (end - first) * size) for first, end in _runs(used)])
            while ordered:
                part, ordered = (
                    ordered[:TRANSACTION_HEADERS_MAX],
                    ordered[TRANSACTION_HEADERS_MAX:],
                )
                self._write(pool, part, final, self.applied_sequence if ordered else last_sequence)
            if self.applied_sequence < last_sequence:
                self._write(pool, [], final, last_sequence)

    def read(self, first_block: int, header_limit: int) -> tuple[list[BlockHeader], int]:
        headers: list[BlockHeader] = []
        block, end = first_block, self._superblock.block_count
        with self._lock:
            pool = self._opened()
            while block < end:
                count = min(_SCAN_HEADERS, self._blocks_to_segment_end(block), end - block)
                records = pool.read(self._offset(block), count * form.HEADER_BYTES)
                if records.count(0) != len(records):
                    for index in range(count):
                        at = index * form.HEADER_BYTES
                        record = records[at : at + form.HEADER_BYTES]
                        if record == form.FREE_HEADER:
                            continue
                        if len(headers) == header_limit:
                            return headers, block + index
                        try:
                            headers.append(self._decode(record, block + index))
                        except DamagedError:
                            if block + index == first_block:
                                raise
                            return headers, block + index
                block += count
        return headers, end

    def close(self) -> None:
        """Waits for a call that is under way; later ones fail."""
        with self._lock:
            pool, self._pool = self._opened(), None
            pool.close()

    def _reduce(self, changes: Sequence[HeaderChange]) -> dict[int, bytes]:
        """The encoded header that each block ends with. Raises ``InvalidError``."""
        final: dict[int, bytes] = {}
        block_size = self._superblock.block_size_bytes
        for change in changes:
            check_change(change, self._path, self._superblock)
            last = change.block_count - 1
            for index in range(change.block_count):
                block = change.block + index
                if change.ino == 0:
                    final[block] = form.FREE_HEADER
                    continue
                checksum = change.checksums[8 * index : 8 * index + 8]
                final[block] = form.encode_header(
                    BlockHeader(
                        block,
                        change.ino,
                        change.file_block + index,
                        change.generation,
                        change.tail_stored_bytes if index == last else block_size,
                        change.tail_visible_bytes if index == last else block_size,
                        int.from_bytes(checksum, "little"),
                    )
                )
        return final

    def _write(
        self, pool: Pool, blocks: Sequence[int], final: dict[int, bytes], applied_sequence: int
    ) -> None:
        held_blocks = self.held_blocks
        with pool.transaction() as transaction:
            for first, end in self._runs_in_segments(blocks):
                at = self._offset(first)
                old = pool.read(at, (end - first) * form.HEADER_BYTES)
                new = [final[block] for block in range(first, end)]
                for index, record in enumerate(new):
                    before = old[index * form.HEADER_BYTES : (index + 1) * form.HEADER_BYTES]
                    held_blocks += (record != form.FREE_HEADER) - (before != form.FREE_HEADER)
                transaction.write(at, b"".join(new))
            transaction.write(self._state_at, form.encode_state(applied_sequence, held_blocks))
        self.applied_sequence, self.held_blocks = applied_sequence, held_blocks

    def _runs_in_segments(self, blocks: Sequence[int]) -> Iterator[tuple[int, int]]:
        for first, end in _runs(blocks):
            while first < end:
                stop = min(end, first + self._blocks_to_segment_end(first))
                yield first, stop
                first = stop

    def _blocks_to_segment_end(self, block: int) -> int:
        return self._blocks_per_segment - block % self._blocks_per_segment

    def _offset(self, block: int) -> int:
        segment, index = divmod(block, self._blocks_per_segment)
        return self._header_offsets[segment] + index * form.HEADER_BYTES

    def _decode(self, record: bytes, block: int) -> BlockHeader:
        header = form.decode_header(record, block)
        if header is None:
            raise DamagedError(
                f"region {self._path}: the header of block {block} is damaged. The block's file is "
                "not known from the region alone any more; the metadata server knows it"
            )
        return header

    def _opened(self) -> Pool:
        if self._pool is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF), str(self._path))
        return self._pool


def _runs(blocks: Sequence[int]) -> Iterator[tuple[int, int]]:
    """First and end of each run of neighbours in what is sorted."""
    index = 0
    while index < len(blocks):
        first = end = blocks[index]
        while index < len(blocks) and blocks[index] == end:
            end += 1
            index += 1
        yield first, end
