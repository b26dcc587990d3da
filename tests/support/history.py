"""A seeded history of changes to a few files, and what is right after a crash in the middle of it.

The steps follow from the seed alone, so whoever knows how many were acknowledged knows everything
that was promised. Each step is one change of the name space: a crash leaves the files as they were
after some step, whole steps before it and nothing of those behind it.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

from crailfs.units import blocks_for

FILES_MAX: Final = 10
SIZE_MAX_BYTES: Final = 400_000
"""Six blocks of 64 KiB and something: a write is one commit."""


class Kind(enum.Enum):
    CREATE = "create"
    WRITE = "write"
    TRUNCATE = "truncate"
    RENAME = "rename"
    DELETE = "delete"
    SYNC = "sync"


class Step(NamedTuple):
    number: int
    """From 1."""
    kind: Kind
    name: str
    new_name: str = ""
    """RENAME: replaces what has this name."""
    offset: int = 0
    length: int = 0
    """WRITE: bytes; TRUNCATE: the size that the file gets."""
    is_durable: bool = False
    """WRITE: ends with an fsync. A SYNC always is."""


class File:
    """What one file holds, and which of its blocks nobody has synced since they were written."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        """Where it was made: its blocks' class follows from that."""
        self.data = bytearray()
        self.unsynced: set[int] = set()


class Observed(NamedTuple):
    """A file as it was found."""

    size: int
    blocks: tuple[bytes | None, ...]
    """None: reading it is an error."""


class History:
    """``directories`` are those in which files are made, each for another storage class."""

    def __init__(self, seed: str, directories: tuple[str, ...], block_size_bytes: int) -> None:
        self.number = 0
        """Steps that were applied."""
        self.files: dict[str, File] = {}
        """By path below the load's directory."""
        self._seed = seed
        self._directories = directories
        self._block_size_bytes = block_size_bytes
        self._created = 0

    def next_step(self) -> Step:
        """The step that comes now. Changes nothing: ``apply`` does."""
        choose = random.Random(f"{self._seed}/{self.number}")
        number = self.number + 1
        names = sorted(self.files)
        if not names or (len(names) < FILES_MAX and choose.random() < 0.25):
            directory = choose.choice(self._directories)
            return Step(number, Kind.CREATE, f"{directory}/{self._created}")
        name = choose.choice(names)
        size = len(self.files[name].data)
        kinds = (Kind.WRITE, Kind.SYNC, Kind.TRUNCATE, Kind.RENAME, Kind.DELETE)
        kind = choose.choices(kinds, (50, 15, 10, 10, 15))[0]
        if kind is Kind.WRITE or size == 0:
            offset = choose.choice((0, size, choose.randrange(size + 1), size + 70_000))
            length = choose.choice((1, 700, 4096, 65_536, 100_000, 250_000))
            offset = min(offset, SIZE_MAX_BYTES - length)
            durable = choose.random() < 0.4
            return Step(number, Kind.WRITE, name, "", offset, length, durable)
        if kind is Kind.TRUNCATE:
            return Step(number, kind, name, length=choose.randrange(SIZE_MAX_BYTES))
        if kind is Kind.RENAME:
            directory = choose.choice(self._directories)
            others = [other for other in names if other != name]
            return Step(number, kind, name, choose.choice((f"{directory}/r{number}", *others)))
        return Step(number, kind, name, is_durable=kind is Kind.SYNC)

    def content(self, step: Step) -> bytes:
        """What a WRITE writes."""
        return random.Random(f"{self._seed}/{step.number}/bytes").randbytes(step.length)

    def apply(self, step: Step) -> None:
        assert step.number == self.number + 1
        self.number = step.number
        if step.kind is Kind.CREATE:
            self._created += 1
            self.files[step.name] = File(step.name.partition("/")[0])
            return
        file = self.files[step.name]
        match step.kind:
            case Kind.WRITE:
                end = step.offset + step.length
                size = self._block_size_bytes
                self._resize(file, max(end, len(file.data)))
                file.data[step.offset : end] = self.content(step)
                file.unsynced |= set(range(step.offset // size, blocks_for(end, size)))
            case Kind.TRUNCATE:
                self._resize(file, step.length)
            case Kind.RENAME:
                self.files[step.new_name] = self.files.pop(step.name)
            case Kind.DELETE:
                del self.files[step.name]
        if step.is_durable:
            file.unsynced.clear()

    def run_to(self, number: int) -> None:
        while self.number < number:
            self.apply(self.next_step())

    def difference(
        self, observed: Mapping[str, Observed], is_losable: Callable[[File], bool]
    ) -> str | None:
        """What is not as it is after the steps so far; None: all is.

        A block may be unreadable if nobody has synced it since it was written and its file
        ``is_losable``.
        """
        if set(observed) != set(self.files):
            return f"there are {sorted(observed)} instead of {sorted(self.files)}"
        for name, file in self.files.items():
            found = observed[name]
            if found.size != len(file.data):
                return f"{name} has {found.size} bytes instead of {len(file.data)}"
            for index, block in enumerate(found.blocks):
                at = index * self._block_size_bytes
                if block is None:
                    if index not in file.unsynced or not is_losable(file):
                        return f"{name}: block {index} cannot be read"
                elif block != file.data[at : at + self._block_size_bytes]:
                    return f"{name}: block {index} has other bytes"
        return None

    def _resize(self, file: File, size: int) -> None:
        if size < len(file.data):
            del file.data[size:]
            file.unsynced -= {
                block
                for block in file.unsynced
                if block >= blocks_for(size, self._block_size_bytes)
            }
        else:
            file.data += bytes(size - len(file.data))


def settle(
    history: History,
    observed: Mapping[str, Observed],
    *,
    durable: int,
    acknowledged: int,
    is_losable: Callable[[File], bool],
) -> None:
    """Bring ``history`` to the step after which everything is as it was found: not before step
    ``durable``, at most one step (which was under way) after ``acknowledged``.

    Raises ``AssertionError`` if there is no such step; with what is different after each.
    """
    history.run_to(durable)
    differences = []
    while (difference := history.difference(observed, is_losable)) is not None:
        differences.append(f"after step {history.number}: {difference}")
        assert history.number <= acknowledged, (
            f"not as after any step from {durable} to {acknowledged + 1}:\n"
            + "\n".join(differences)
        )
        history.run_to(history.number + 1)
