"""Cutting off a client that lost its session, so that its blocks can be given to others.

A client is *refused* from the moment that the metadata server asks for it: connections are closed
and new ones turned away, for good and across restarts. It is *fenced* once it also has no write
under way and none of its processes holds a life line any more.

A life line is a file under ``clients/`` whose exclusive flock was taken on the descriptor that the
client was passed, and only there. So the lock lasts exactly as long as a process of the client has
it open, whatever happens to this server; and being able to take it is proof that all are gone.
"""

from __future__ import annotations

import fcntl
import logging
import os
import struct
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from crailfs.errors import FencedError

log = logging.getLogger(__name__)

REFUSED_MAX: Final = 1 << 20
"""Ids remembered across a restart; the oldest are forgotten beyond it."""

_ID: Final = struct.Struct(">Q")


class Fencing:
    """Who is refused, and whether they are gone. ``state`` is the server's state directory."""

    def __init__(self, state: Path) -> None:
        self._life_lines = state / "clients"
        self._life_lines.mkdir(mode=0o700, exist_ok=True)
        self._refused_path = state / "fenced"
        self._refused = self._load_refused()

    def check(self, client_id: int) -> None:
        """Raises ``FencedError`` for a client that is refused."""
        if client_id in self._refused:
            raise FencedError(
                f"client {client_id:016x} lost its session; it must come back under a new id"
            )

    def refuse(self, client_ids: Iterable[int]) -> None:
        """Turn these away from now on, durably. Raises ``OSError`` if that fails."""
        fresh = [client_id for client_id in client_ids if client_id not in self._refused]
        if fresh:
            fd = os.open(
                self._refused_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600
            )
            try:
                os.write(fd, b"".join(map(_ID.pack, fresh)))
                os.fdatasync(fd)
            finally:
                os.close(fd)
            self._refused.update(fresh)
            log.info("refusing clients %s", ", ".join(f"{one:016x}" for one in fresh))

    def new_life_line(self, client_id: int) -> int:
        """A locked descriptor for this client; close it here once it has been passed on."""
        path = self._life_lines / f"{client_id:016x}.{uuid.uuid4().hex[:16]}"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return fd

    def has_life_line(self, client_id: int) -> bool:
        """Whether a process of this client still holds what was passed to it."""
        held = [_is_held(path) for path in self._life_lines.glob(f"{client_id:016x}.*")]
        return any(held)

    def attached_clients(self) -> set[int]:
        """Those that hold a life line."""
        paths = list(self._life_lines.iterdir())
        return {int(path.name.partition(".")[0], 16) for path in paths if _is_held(path)}

    def sweep(self) -> None:
        """Remove the life lines that nobody holds."""
        for path in self._life_lines.iterdir():
            _is_held(path)

    def _load_refused(self) -> set[int]:
        try:
            stored = self._refused_path.read_bytes()
        except FileNotFoundError:
            return set()
        whole = stored[: len(stored) - len(stored) % _ID.size]
        if len(whole) < len(stored):
            log.warning("%s: dropping an unfinished last entry", self._refused_path)
            os.truncate(self._refused_path, len(whole))
        return set(_last(whole))


def _last(stored: bytes) -> Iterator[int]:
    for (client_id,) in _ID.iter_unpack(stored[-REFUSED_MAX * _ID.size :]):
        yield client_id


def _is_held(path: Path) -> bool:
    """Whether somebody holds this life line; if not, it is removed."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    path.unlink()
    return False
