"""POSIX's clearing of set-id bits.

libfuse tells the kernel that the file system does this itself (FUSE_HANDLE_KILLPRIV), so neither
a write nor a chown comes with a mode of its own: without these rules the bits would stay.
"""

from __future__ import annotations

import stat


def mode_without_set_id(mode: int) -> int:
    """``mode`` (07777) of a regular file after its bytes or its owner have changed.

    Set-group-id without group execution is not a privilege (it once meant mandatory locks) and
    stays.
    """
    mode &= ~stat.S_ISUID
    if mode & stat.S_IXGRP:
        mode &= ~stat.S_ISGID
    return mode
