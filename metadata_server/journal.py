"""The redo journal: what was acknowledged and is not yet in a committed LMDB state.

A header and then records, each with the rows that one batch of operations wrote. All integers are
network order.

    header   magic 8 B, version u32, 4 B zero, cluster id 16 B, boot id 16 B, base u64,
             XXH3-64 of it all
    record   magic u32, body length u32, XXH3-64 of what follows, sequence u64, synced sequence u64,
             body: MessagePack array of [table number, key, value or nil]

Sequences rise by one from record to record. ``base`` is the last that LMDB had committed when the
journal was begun: an LMDB state with less has lost a commit, which damage to its newest meta page
can do. ``synced sequence`` is the last record that was known to be on the medium when this one was
written, and the boot id says under which run of the kernel the journal was begun: together they
tell what a power cut may do to the last, unsynced records from damage, which is refused.
"""

from __future__ import annotations

import logging
import mmap
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import xxhash

from crailfs.errors import DamagedError

log = logging.getLogger(__name__)

_FILE_MAGIC = b"CRLFJRNL"
_VERSION = 1
_FILE_HEADER = struct.Struct(">8sI4x16s16sQ")
_CHECKSUM = struct.Struct(">Q")
HEADER_BYTES = _FILE_HEADER.size + _CHECKSUM.size
_RECORD_MAGIC = 0x43524C4A
_RECORD_HEADER = struct.Struct(">IIQ")
_SEQUENCES = struct.Struct(">QQ")
RECORD_OVERHEAD_BYTES = _RECORD_HEADER.size + _SEQUENCES.size
_BOOT_ID_PATH = Path("/proc/sys/kernel/random/boot_id")

Rows = Sequence[tuple[int, bytes, bytes | None]]
"""(table number, key, value or None for a deletion)."""

_decode_rows = msgspec.msgpack.Decoder(list[tuple[int, bytes, bytes | None]]).decode
_encode_rows = msgspec.msgpack.Encoder().encode


class Record(NamedTuple):
    sequence: int
    synced_sequence: int
    rows: Rows


def current_boot_id() -> bytes:
    """16 bytes that change whenever the kernel starts."""
    return bytes.fromhex(_BOOT_ID_PATH.read_text().strip().replace("-", ""))


class Journal:
    """An open journal file. One writer; ``sync`` may run in another thread meanwhile."""

    def __init__(
        self, path: Path, descriptor: int, cluster_id: bytes, boot_id: bytes, base_sequence: int
    ) -> None:
        self.path = path
        self._descriptor = descriptor
        self._cluster_id = cluster_id
        self._boot_id = boot_id
        self._base_sequence = base_sequence
        self._end_bytes = HEADER_BYTES
        self.sequence = 0
        """Of the last record."""
        self.synced_sequence = 0
        """The last record that is known to outlive a power cut."""

    @classmethod
    def create(cls, path: Path, cluster_id: bytes, sequence: int) -> Journal:
        """Replace the journal at ``path`` by an empty one whose first record is ``sequence`` + 1.

        At each instant there is either the old journal or the new one.
        """
        boot_id = current_boot_id()
        new_path = path.with_name(path.name + ".new")
        descriptor = os.open(new_path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            _write_all(descriptor, _file_header(cluster_id, boot_id, sequence), 0)
            os.fsync(descriptor)
            os.replace(new_path, path)
            sync_directory(path.parent)
        except BaseException:
            os.close(descriptor)
            raise
        journal = cls(path, descriptor, cluster_id, boot_id, sequence)
        journal.sequence = journal.synced_sequence = sequence
        return journal

    @classmethod
    def open(cls, path: Path, cluster_id: bytes) -> Journal:
        """The existing journal at ``path``; ``replay`` must be next.

        DamagedError if it is not a journal or belongs to another cluster.
        """
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            header = os.pread(descriptor, HEADER_BYTES, 0)
            fields = header[: _FILE_HEADER.size]
            if header[_FILE_HEADER.size :] != _CHECKSUM.pack(xxhash.xxh3_64_intdigest(fields)):
                raise _damaged(path, "its header is not that of a journal")
            magic, version, owner, boot_id, base_sequence = _FILE_HEADER.unpack(fields)
            if magic != _FILE_MAGIC or version != _VERSION:
                raise _damaged(path, f"it has version {version}, this server reads {_VERSION}")
            if owner != cluster_id:
                raise _damaged(path, f"it belongs to cluster {owner.hex()}, not {cluster_id.hex()}")
        except BaseException:
            os.close(descriptor)
            raise
        return cls(path, descriptor, cluster_id, boot_id, base_sequence)

    @property
    def size_bytes(self) -> int:
        """Bytes of records since the last ``reset``."""
        return self._end_bytes - HEADER_BYTES

    def append(self, rows: Rows) -> None:
        """Write one record; it outlives this process from here on, and a power cut after ``sync``.

        OSError: it could not be written; the journal is as it was before.
        """
        body = _SEQUENCES.pack(self.sequence + 1, self.synced_sequence) + _encode_rows(rows)
        header = _RECORD_HEADER.pack(
            _RECORD_MAGIC, len(body) - _SEQUENCES.size, xxhash.xxh3_64_intdigest(body)
        )
        try:
            _write_all(self._descriptor, header + body, self._end_bytes)
        except OSError:
            os.ftruncate(self._descriptor, self._end_bytes)
            raise
        self._end_bytes += len(header) + len(body)
        self.sequence += 1

    def sync(self) -> None:
        """Wait until everything appended before is on the medium."""
        sequence = self.sequence
        os.fdatasync(self._descriptor)
        self.synced_sequence = max(self.synced_sequence, sequence)

    def reset(self) -> None:
        """Forget all records: a synced LMDB state has them."""
        os.ftruncate(self._descriptor, HEADER_BYTES)
        # Within one sector, so that a power cut leaves the old header or this one.
        _write_all(
            self._descriptor, _file_header(self._cluster_id, self._boot_id, self.sequence), 0
        )
        self._end_bytes = HEADER_BYTES
        self.synced_sequence = self.sequence

    def close(self) -> None:
        os.close(self._descriptor)

    def replay(self, after_sequence: int) -> Iterator[Record]:
        """Every record behind ``after_sequence``, in order; afterwards the journal can be appended
        to.

        A torn end is cut off. DamagedError: records that must be there are missing or bad, or
        LMDB's state, which has everything up to ``after_sequence``, is older than it must be.
        """
        if after_sequence < self._base_sequence:
            raise _damaged(
                self.path,
                f"LMDB's database has {after_sequence} of the {self._base_sequence} records that "
                "it had committed",
            )
        self.sequence = after_sequence
        size_bytes = os.fstat(self._descriptor).st_size
        offset = HEADER_BYTES
        expected: int | None = None
        with mmap.mmap(self._descriptor, size_bytes, access=mmap.ACCESS_READ) as mapping:
            while offset < size_bytes:
                found = _parse(mapping, offset)
                if found is None:
                    self._refuse_damage(mapping, offset, self.sequence + 1)
                    break
                record, next_offset = found
                if record.sequence > after_sequence + 1 and expected is None:
                    raise _damaged(self.path, f"records from {after_sequence + 1} on are missing")
                if expected is not None and record.sequence != expected:
                    raise _damaged(
                        self.path, f"record {expected} is missing before {record.sequence}"
                    )
                expected = record.sequence + 1
                offset = next_offset
                if record.sequence > after_sequence:
                    self.sequence = record.sequence
                    yield record
        if offset < size_bytes:
            log.warning(
                "%s: cut off %d bytes of records that were not completely written",
                self.path,
                size_bytes - offset,
            )
            os.ftruncate(self._descriptor, offset)
        self._end_bytes = offset

    def _refuse_damage(self, mapping: mmap.mmap, offset: int, bad_sequence: int) -> None:
        """Raise unless the bad bytes at ``offset`` are what a crash can leave at the end.

        A killed process leaves part of its last record. A power cut may lose any of the records
        that were not yet synced, so good ones may follow.
        """
        magic = _RECORD_MAGIC.to_bytes(4, "big")
        at = mapping.find(magic, offset + 1)
        while at >= 0:
            found = _parse(mapping, at)
            if found is not None and found[0].sequence >= bad_sequence:
                synced = found[0].synced_sequence >= bad_sequence
                if synced or self._boot_id == current_boot_id():
                    raise _damaged(
                        self.path,
                        f"record {bad_sequence} at byte {offset} is bad, record "
                        f"{found[0].sequence} behind it is good",
                    )
            at = mapping.find(magic, at + 1)


def _file_header(cluster_id: bytes, boot_id: bytes, base_sequence: int) -> bytes:
    header = _FILE_HEADER.pack(_FILE_MAGIC, _VERSION, cluster_id, boot_id, base_sequence)
    return header + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(header))


def sync_directory(path: Path) -> None:
    """Make the directory's entries outlive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _parse(mapping: mmap.mmap, offset: int) -> tuple[Record, int] | None:
    """The record at ``offset`` and where the next one begins; None if there is no good one."""
    body_offset = offset + _RECORD_HEADER.size
    if body_offset + _SEQUENCES.size > len(mapping):
        return None
    magic, rows_bytes, checksum = _RECORD_HEADER.unpack_from(mapping, offset)
    end = body_offset + _SEQUENCES.size + rows_bytes
    if magic != _RECORD_MAGIC or end > len(mapping):
        return None
    body = mapping[body_offset:end]
    if xxhash.xxh3_64_intdigest(body) != checksum:
        return None
    sequence, synced_sequence = _SEQUENCES.unpack_from(body)
    try:
        rows = _decode_rows(body[_SEQUENCES.size :])
    except msgspec.MsgspecError:
        return None
    return Record(sequence, synced_sequence, rows), end


def _write_all(descriptor: int, data: bytes, offset: int) -> None:
    written = os.pwrite(descriptor, data, offset)
    while written < len(data):
        written += os.pwrite(descriptor, data[written:], offset + written)


def _damaged(path: Path, what: str) -> DamagedError:
    return DamagedError(
        f"journal {path} is damaged: {what}. Nothing was changed. Restore the metadata server's "
        f"state directory from a backup; 'crail fsck' shows what a restored one holds"
    )
