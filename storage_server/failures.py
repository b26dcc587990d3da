"""Which blocks a device fails at, so that they are never handed out again."""

from __future__ import annotations

import errno
import logging
from dataclasses import dataclass
from typing import Final

from storage_server.region import Region

PASSING_ERRORS: Final = frozenset(
    {errno.ENOMEM, errno.ENOBUFS, errno.EAGAIN, errno.EINTR, errno.ECANCELED, errno.EBADF}
    | {errno.ENOSPC, errno.EDQUOT}
)
"""Those that say that there is no memory or room at the moment, or that the region is being closed,
and nothing of the medium."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Where:
    """What was being done when a device failed. ``byte_count`` 0: ``action``, to no block."""

    region: Region
    offset: int = 0
    byte_count: int = 0
    writing: bool = False
    action: str = ""

    def __str__(self) -> str:
        if not self.byte_count:
            return self.action
        action = "writing" if self.writing else "reading"
        return f"{action} {self.byte_count} bytes at {self.offset}"


async def retire_failing(where: Where, problem: int) -> bool:
    """Read the blocks one by one, and retire those that the device does not deliver; if it delivers
    all of them but did not take a write, which failed with the errno ``problem``, those that were
    to be written. Whether there were any."""
    if not where.byte_count:
        return False
    region, size_bytes = where.region, where.region.medium.superblock.block_size_bytes
    blocks = region.blocks(where.offset, where.byte_count)
    buffer = memoryview(bytearray(size_bytes))
    failing = set()
    for block in blocks:
        try:
            await region.medium.read(block * size_bytes, buffer)
        except OSError as error:
            if error.errno not in PASSING_ERRORS:
                failing.add(block)
    if where.writing and not failing and problem not in PASSING_ERRORS:
        failing.update(blocks)
    if failing:
        region.failed_blocks |= failing
        log.error("region %s: blocks %s are retired", region.medium.path, sorted(failing))
    return bool(failing)
