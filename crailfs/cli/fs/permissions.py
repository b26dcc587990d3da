"""Modes of what a command makes."""

from __future__ import annotations

import os


def creation_mode(mode: int) -> int:
    """``mode`` less this process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mode & ~mask
