"""Log files that a process writes by itself and that stay bounded all the same."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from crailfs.units import MIB

LOG_MAX_BYTES: Final = 8 * MIB
"""Of one file; a second one holds what came before it."""


def open_log(path: Path) -> int:
    """A descriptor to hand to a process as its stdout and stderr."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)


def bound_log(path: Path, max_bytes: int = LOG_MAX_BYTES) -> bool:
    """If the file has grown beyond ``max_bytes``: keep its last ``max_bytes`` beside it as
    ``<name>.1`` and empty it; whether it did.

    The writer has it open for appending and goes on at the new end. Lines that it writes between
    our reading and emptying are lost: that is the price for its needing nothing of us.
    """
    try:
        size_bytes = path.stat().st_size
    except FileNotFoundError:
        return False
    if size_bytes <= max_bytes:
        return False
    with path.open("rb+") as log_file:
        log_file.seek(size_bytes - max_bytes)
        older = log_file.read(max_bytes)
        log_file.truncate(0)
    older_path = path.with_name(path.name + ".1")
    fd = os.open(older_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as older_file:
        older_file.write(older)
    return True
