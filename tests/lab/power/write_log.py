"""A device whose writes and flushes are recorded, and the states that a power cut may leave of it.

The recorder is the kernel's dm-log-writes. It logs a write when it has completed and a flush has
followed, in the order of the flushes; so what stands in the log before a flush is on the medium
when that flush is done, and of what stands behind it a device with a volatile cache may keep any
part. The format is that of Documentation/admin-guide/device-mapper/log-writes.rst and
drivers/md/dm-log-writes.c, little-endian.
"""

from __future__ import annotations

import gc
import os
import random
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

SECTOR_BYTES: Final = 512
MAGIC: Final = 0x6A736677736872
VERSION: Final = 1
FLUSH, FUA, DISCARD, MARK = 1, 2, 4, 8
_SUPER: Final = struct.Struct("<QQQI")
_ENTRY: Final = struct.Struct("<QQQQ")
_GARBAGE: Final = b"\xdd"
"""What discarded blocks read as."""
_NAME: Final = "crail-write-log"


@dataclass(frozen=True)
class Entry:
    """One request that the device completed."""

    offset: int
    """Bytes, as the rest."""
    flags: int
    data: bytes
    mark: str


class Recorder:
    """Records what is written to ``path`` until ``close``."""

    def __init__(self, device: Path, log: Path) -> None:
        self._log = log
        _run("modprobe", "dm-log-writes")
        sectors = int(_run("blockdev", "--getsz", str(device)))
        table = f"0 {sectors} log-writes {device} {log}"
        _run("dmsetup", "create", "--noudevsync", _NAME, "--table", table)
        _run("dmsetup", "mknodes", _NAME)
        self.path = Path("/dev/mapper") / _NAME

    def mark(self, text: str) -> None:
        """Whatever was flushed before stands before the mark."""
        _run("dmsetup", "message", _NAME, "0", "mark", text)

    def close(self) -> list[Entry]:
        """End recording; all that was recorded."""
        _run("dmsetup", "remove", "--noudevsync", _NAME)
        return list(read_log(self._log))


def read_log(path: Path) -> Iterator[Entry]:
    with open(path, "rb") as log:
        magic, version, count, sector_bytes = _SUPER.unpack(log.read(_SUPER.size))
        assert (magic, version) == (MAGIC, VERSION), f"{path} holds no log of writes"
        position = sector_bytes
        for _ in range(count):
            log.seek(position)
            sector, sector_count, flags, text_bytes = _ENTRY.unpack(log.read(_ENTRY.size))
            text = log.read(text_bytes).rstrip(b"\0").decode() if flags & MARK else ""
            position += sector_bytes
            length = sector_count * sector_bytes
            log.seek(position)
            if flags & DISCARD:
                yield Entry(sector * sector_bytes, flags, _GARBAGE * length, text)
                continue
            yield Entry(sector * sector_bytes, flags, log.read(length), text)
            position += length


class Replay:
    """The device's content, entry by entry."""

    def __init__(self, initial: bytes, entries: list[Entry]) -> None:
        self.content = bytearray(initial)
        self.position = 0
        """Entries that were applied."""
        self._entries = entries

    @property
    def boundaries(self) -> list[int]:
        """Positions at which everything before is on the medium for certain."""
        return [
            index + 1
            for index, entry in enumerate(self._entries)
            if entry.flags & (FLUSH | FUA | MARK)
        ]

    def mark_at(self, position: int) -> str:
        """The mark that was the last entry before, if one was."""
        return self._entries[position - 1].mark

    def run_to(self, position: int) -> None:
        for entry in self._entries[self.position : position]:
            _apply(self.content, entry)
        self.position = position

    def torn(self, choose: random.Random, atom_bytes: int) -> bytearray:
        """The content when the power fails before the next flush is done: with some of the writes
        that the flush was for, each as a whole or up to a multiple of ``atom_bytes``."""
        content = bytearray(self.content)
        for entry in self._entries[self.position :]:
            if entry.flags & MARK:
                break
            kept = choose.choice((0, 1, 1, choose.random()))
            whole = int(len(entry.data) * kept) // atom_bytes * atom_bytes
            _apply(content, Entry(entry.offset, entry.flags, entry.data[:whole], ""))
            if entry.flags & (FLUSH | FUA):
                break
        return content


def read_device(path: Path) -> bytes:
    with open(path, "rb") as device:
        return device.read()


class LoopDevice:
    """A block device that holds ``content``; leaving the block removes it."""

    def __init__(self, content: bytearray, file: Path) -> None:
        file.write_bytes(content)
        _run("modprobe", "loop")
        self._path = _run("losetup", "--find", "--show", "--direct-io=off", str(file)).strip()

    def __enter__(self) -> Path:
        return Path(self._path)

    def __exit__(self, *exception: object) -> None:
        _run("losetup", "--detach", self._path)


def mount(device: Path, directory: Path) -> None:
    directory.mkdir(exist_ok=True)
    _run("mount", str(device), str(directory))


def unmount(directory: Path, *, wait: bool = True) -> None:
    """Without ``wait``, what an error's traceback still holds there does not hide the error."""
    gc.collect()  # what is still mapped there is in nobody's use any more
    _run("umount", *(() if wait else ("--lazy",)), str(directory))


def make_file_system(device: Path) -> None:
    _run("mkfs.ext4", "-q", "-E", "nodiscard,lazy_itable_init=0,lazy_journal_init=0", str(device))


def _apply(content: bytearray, entry: Entry) -> None:
    content[entry.offset : entry.offset + len(entry.data)] = entry.data


def _run(*argv: str) -> str:
    done = subprocess.run(argv, check=False, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, f"{' '.join(argv)}: {done.stdout}{done.stderr}"
    return done.stdout
