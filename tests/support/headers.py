"""Block headers in this process's memory, as durable as the process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from crailfs.errors import DamagedError
from crailfs.records import BlockHeader, HeaderChange


class MemoryHeaders:
    """A ``HeaderStore``."""

    def __init__(self, block_count: int, block_size_bytes: int) -> None:
        self.block_count = block_count
        self.block_size_bytes = block_size_bytes
        self.applied_sequence = 0
        self.headers: dict[int, BlockHeader] = {}
        self.damaged: set[int] = set()
        self.apply_count = 0

    @property
    def held_blocks(self) -> int:
        return len(self.headers)

    def apply(self, changes: Sequence[HeaderChange], last_sequence: int) -> None:
        for change in changes:
            for header in headers_of(change, self.block_size_bytes):
                self.headers[header.block] = header
            if not change.ino:
                for block in range(change.block, change.block + change.block_count):
                    self.headers.pop(block, None)
        assert last_sequence >= self.applied_sequence, "a region goes back in time"
        self.applied_sequence = last_sequence
        self.apply_count += 1

    def read(self, first_block: int, header_limit: int) -> tuple[list[BlockHeader], int]:
        found: list[BlockHeader] = []
        for block in range(first_block, self.block_count):
            if block in self.damaged:
                if block > first_block:
                    return found, block
                raise DamagedError(f"the header of block {block} does not check")
            if block in self.headers:
                found.append(self.headers[block])
                if len(found) == header_limit:
                    return found, block + 1
        return found, self.block_count


def headers_of(change: HeaderChange, block_size_bytes: int) -> Iterator[BlockHeader]:
    """One header for each block that a change publishes."""
    if not change.ino:
        return
    for index in range(change.block_count):
        is_last = index == change.block_count - 1
        yield BlockHeader(
            block=change.block + index,
            ino=change.ino,
            file_block=change.file_block + index,
            generation=change.generation,
            stored_bytes=change.tail_stored_bytes if is_last else block_size_bytes,
            visible_bytes=change.tail_visible_bytes if is_last else block_size_bytes,
            checksum=int.from_bytes(change.checksums[8 * index : 8 * index + 8], "little"),
        )
