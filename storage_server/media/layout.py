"""Where a region's blocks lie in its file, and how clients of its host reach them."""

from __future__ import annotations

from dataclasses import dataclass

from crailfs.wire.messages import Access, FlushMethod


@dataclass(frozen=True)
class Layout:
    """Fields as in ``AttachedRegion``, where they travel to the clients."""

    data_offset: int
    access: Access
    flush_method: FlushMethod = FlushMethod.NONE
    segment_bytes: int = 0
    segment_offsets: tuple[int, ...] = ()
    map_sync: bool = False
