"""From block headers to files: which blocks are whose, in which order, which are out of date."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

from crailfs.limits import EXTENT_BLOCKS_MAX, FILE_SIZE_MAX_BYTES
from crailfs.records import BlockHeader, Extent, Location
from crailfs.units import ROOT_INODE

_NUMBER_MAX: Final = (1 << 63) - 2
"""Of inodes and generations: the metadata server begins one above."""
_GENERATION_END: Final = 1 << 64

_ROW: Final = struct.Struct(">QQQIQIIQ")
"""Inode, file block, 2^64 - generation, region, block, stored and visible bytes, checksum: as bytes
in an order in which a file's blocks follow each other and the newest of each comes first."""


class FoundFile(NamedTuple):
    ino: int
    size_bytes: int
    """To the end of the last visible byte; what was a hole behind it is not known any more."""
    extents: tuple[Extent, ...]
    block_count: int
    superseded_count: int
    """Blocks left out because a newer one takes their place."""


class FoundBlocks:
    """All headers of some regions; holds about 100 bytes for each."""

    def __init__(self, block_size_bytes: int) -> None:
        self._block_size_bytes = block_size_bytes
        self._rows: list[bytes] = []
        self.senseless_count = 0
        """Headers that no commit can have led to."""
        self.next_ino = ROOT_INODE + 1
        self.next_generation = 1
        """Above all that the headers mention."""

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, region: int, header: BlockHeader) -> None:
        if not self._makes_sense(header):
            self.senseless_count += 1
            return
        self.next_ino = max(self.next_ino, header.ino + 1)
        self.next_generation = max(self.next_generation, header.generation + 1)
        self._rows.append(
            _ROW.pack(
                header.ino,
                header.file_block,
                _GENERATION_END - header.generation,
                region,
                header.block,
                header.stored_bytes,
                header.visible_bytes,
                header.checksum,
            )
        )

    def _makes_sense(self, header: BlockHeader) -> bool:
        end_bytes = header.file_block * self._block_size_bytes + header.visible_bytes
        return (
            ROOT_INODE < header.ino <= _NUMBER_MAX
            and 1 <= header.generation <= _NUMBER_MAX
            and header.file_block >= 0
            and 0 < header.visible_bytes <= header.stored_bytes <= self._block_size_bytes
            and end_bytes <= FILE_SIZE_MAX_BYTES
            and 0 <= header.checksum < 1 << 64
        )

    def files(self) -> Iterator[FoundFile]:
        """Every file, by inode. Where two blocks claim the same place in a file, the one of the
        higher generation has it: it was committed later."""
        self._rows.sort()
        file: _File | None = None
        for row in self._rows:
            ino = _ROW.unpack_from(row)[0]
            if file is not None and file.ino != ino:
                yield file.done()
                file = None
            if file is None:
                file = _File(ino, self._block_size_bytes)
            file.add(row)
        if file is not None:
            yield file.done()


class _File:
    """Puts one file together, from its rows in order."""

    def __init__(self, ino: int, block_size_bytes: int) -> None:
        self.ino = ino
        self._block_size_bytes = block_size_bytes
        self._extents: list[Extent] = []
        self._run: list[tuple[int, ...]] = []
        """Rows, unpacked, that make up the next extent."""
        self._last_file_block = -1
        self._block_count = self._superseded_count = 0

    def add(self, packed: bytes) -> None:
        row = _ROW.unpack(packed)
        if row[1] == self._last_file_block:
            self._superseded_count += 1
            return
        self._last_file_block = row[1]
        self._block_count += 1
        if self._run and not self._continues(row):
            self._end_run()
        self._run.append(row)

    def done(self) -> FoundFile:
        self._end_run()
        last = self._extents[-1]
        full_blocks = last.file_block + last.block_count - 1
        size_bytes = full_blocks * self._block_size_bytes + last.tail_visible_bytes
        return FoundFile(
            self.ino, size_bytes, tuple(self._extents), self._block_count, self._superseded_count
        )

    def _continues(self, row: tuple[int, ...]) -> bool:
        _, file_block, generation, region, block, stored_bytes, visible_bytes, _ = self._run[-1]
        return (
            len(self._run) < EXTENT_BLOCKS_MAX
            and row[1:5] == (file_block + 1, generation, region, block + 1)
            and stored_bytes == visible_bytes == self._block_size_bytes
        )

    def _end_run(self) -> None:
        _, file_block, generation, region, block, _, _, _ = self._run[0]
        self._extents.append(
            Extent(
                file_block=file_block,
                block_count=len(self._run),
                tail_stored_bytes=self._run[-1][5],
                tail_visible_bytes=self._run[-1][6],
                replicas=(Location(region, block, _GENERATION_END - generation),),
                checksums=b"".join(row[7].to_bytes(8, "little") for row in self._run),
            )
        )
        self._run = []
