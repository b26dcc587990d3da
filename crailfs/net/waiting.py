"""Short waits in place, for a peer that answers sooner than trio's scheduler turns round."""

from __future__ import annotations

import select
from typing import Final

_DESCRIPTORS_MAX: Final = 1_024
"""``select`` (the only wait that Python offers in microseconds) takes no higher descriptors."""


def can_wait_briefly(fd: int) -> bool:
    return fd < _DESCRIPTORS_MAX


def wait_briefly(fd: int, timeout_s: float, *, writable: bool = False) -> bool:
    """Blocks the thread until ``fd`` is readable (or, if asked for, writable); False: timed out.

    ``can_wait_briefly(fd)`` must hold.
    """
    descriptors = [fd]
    readable, ready, _ = select.select(descriptors, descriptors if writable else (), (), timeout_s)
    return bool(readable or ready)
