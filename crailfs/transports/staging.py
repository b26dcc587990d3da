"""Bytes that are handed over to be written later, and that nobody changes meanwhile."""

from __future__ import annotations

from crailfs.net.sending import Buffer


def stable(data: Buffer) -> Buffer:
    """``data`` itself if nobody can change it, else a copy."""
    if isinstance(data, bytes):
        return data
    view = memoryview(data)
    return view if isinstance(view.obj, bytes) else bytes(view)
