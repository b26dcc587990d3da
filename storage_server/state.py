"""What a storage server remembers in its state directory.

lock        flock of the running server
server.json identity, epoch, and which regions it has where
fenced      client ids that are refused for good, 8 bytes each (see ``fencing.py``)
clients/    life lines (see ``fencing.py``)
"""

from __future__ import annotations

import fcntl
import logging
import os
import uuid
from pathlib import Path
from typing import Final

import msgspec

from crailfs.errors import BusyError, ConfigurationError, DamagedError

log = logging.getLogger(__name__)

FORMAT_VERSION: Final = 1


class KnownRegion(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    path: str
    uuid: str
    """32 hexadecimal digits."""


class _Stored(msgspec.Struct, forbid_unknown_fields=True):
    format_version: int
    server_id: str
    """32 hexadecimal digits."""
    cluster_id: str
    """32 hexadecimal digits; empty until the server has met its cluster."""
    epoch: int
    """Grows by one at each start."""
    regions: list[KnownRegion]


class State:
    """One server's state directory, locked while this object is open."""

    def __init__(self, directory: Path, lock_fd: int, stored: _Stored) -> None:
        self.directory = directory
        self._lock_fd = lock_fd
        self._stored = stored

    @classmethod
    def open(cls, directory: Path) -> State:
        """Lock the directory (made if it does not exist) and count this start.

        Raises ``BusyError`` if another server runs on it, ``DamagedError`` if it cannot be read,
        ``ConfigurationError`` if this user may not write there.
        """
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock_fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigurationError(
                f"state directory {directory} cannot be used: {error.strerror}"
            ) from error
        try:
            try:
                fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BusyError(
                    f"another storage server runs on state directory {directory}; stop it first, "
                    "or give this one a directory of its own"
                ) from None
            state = cls(directory, lock_fd, _load(directory / "server.json"))
            state._stored.epoch += 1
            state._save()
        except BaseException:
            os.close(lock_fd)
            raise
        return state

    @property
    def server_id(self) -> bytes:
        return bytes.fromhex(self._stored.server_id)

    @property
    def epoch(self) -> int:
        return self._stored.epoch

    def known_uuid(self, path: Path) -> bytes | None:
        """The region that this server had at ``path``, if any."""
        for region in self._stored.regions:
            if region.path == str(path):
                return bytes.fromhex(region.uuid)
        return None

    def check_cluster(self, cluster_id: bytes) -> None:
        """Raises ``ConfigurationError`` if this server belongs to another cluster."""
        if self._stored.cluster_id not in ("", cluster_id.hex()):
            raise ConfigurationError(
                f"state directory {self.directory} belongs to cluster {self._stored.cluster_id}, "
                f"the metadata server to {cluster_id.hex()}: correct the address of the metadata "
                "server, or use another state directory; a metadata server whose state is lost is "
                f"begun anew with cluster.id = {self._stored.cluster_id}"
            )

    def remember(self, cluster_id: bytes, regions: list[KnownRegion]) -> None:
        """Keep what is served now; regions that are no longer configured are forgotten."""
        for region in self._stored.regions:
            if region.path not in [kept.path for kept in regions]:
                log.warning("region %s is no longer configured: forgetting it", region.path)
        self._stored.cluster_id = cluster_id.hex()
        self._stored.regions = regions
        self._save()

    def close(self) -> None:
        os.close(self._lock_fd)

    def _save(self) -> None:
        path = self.directory / "server.json"
        unfinished = path.with_suffix(".json.new")
        with unfinished.open("wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(self._stored), indent=2))
            file.flush()
            os.fsync(file.fileno())
        os.rename(unfinished, path)


def _load(path: Path) -> _Stored:
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return _Stored(FORMAT_VERSION, uuid.uuid4().hex, "", 0, [])
    try:
        stored = msgspec.json.decode(text, type=_Stored)
        identities = [stored.server_id, *(region.uuid for region in stored.regions)]
        if stored.cluster_id:
            identities.append(stored.cluster_id)
        if any(len(bytes.fromhex(identity)) != 16 for identity in identities):
            raise ValueError("an identity is not 32 hexadecimal digits")
    except (msgspec.DecodeError, ValueError) as error:
        raise DamagedError(
            f"{path} is damaged ({error}). Restore it: without it nobody can serve this server's "
            "regions; or remove it and the regions' files, whose blocks are then lost"
        ) from error
    if stored.format_version != FORMAT_VERSION:
        raise DamagedError(
            f"{path} has format {stored.format_version}, this program knows {FORMAT_VERSION}: "
            "use the version that wrote it"
        )
    return stored
