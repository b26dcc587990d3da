"""A writing load: run as a process, it reports each acknowledged step on stdout.

    python -m tests.faults.load SEED FIRST mount DIRECTORY
    python -m tests.faults.load SEED FIRST api DIRECTORY CONFIGURATION TRANSPORT

``+ I`` file I is written and closed; ``> I`` it is renamed to its final name; ``- I`` it is gone;
``! I WHAT`` a step on file I failed. Files begin with number FIRST; the bytes of file I follow from
SEED and I alone.
"""

from __future__ import annotations

import logging
import os
import random
import sys
from pathlib import Path
from typing import Protocol

from crailfs.client.blocking import BlockingStore
from crailfs.config_file import Settings
from crailfs.errors import CrailError

KEPT = 60
"""So many files exist at a time; older ones are removed."""


def content(seed: int, index: int) -> bytes:
    """What file ``index`` holds: from nothing up to 1.5 MB, mostly small."""
    choice = random.Random(f"{seed}/{index}")
    size = choice.choice((0, 1, 100, 4096, 65_536, 65_537, 70_000, 200_000, 1_500_000))
    return choice.randbytes(size)


class Front(Protocol):
    """The way to the file system: what fails raises ``OSError`` or ``CrailError``."""

    def write(self, path: str, data: bytes) -> None: ...
    def rename(self, path: str, new_path: str) -> None: ...
    def remove(self, path: str) -> None: ...


class MountFront:
    def write(self, path: str, data: bytes) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            for piece in _pieces(data):
                assert os.write(descriptor, piece) == len(piece)
        finally:
            os.close(descriptor)

    def rename(self, path: str, new_path: str) -> None:
        os.rename(path, new_path)

    def remove(self, path: str) -> None:
        os.unlink(path)


class ApiFront:
    def __init__(self, store: BlockingStore) -> None:
        self._store = store

    def write(self, path: str, data: bytes) -> None:
        with self._store.create(path) as file:
            for piece in _pieces(data):
                file.write(piece)

    def rename(self, path: str, new_path: str) -> None:
        self._store.rename(path, new_path)

    def remove(self, path: str) -> None:
        self._store.delete(path)


def main() -> None:
    seed, first, kind, directory = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    if kind == "mount":
        run(MountFront(), directory, seed, first)
        return
    logging.basicConfig(level=logging.ERROR)
    configuration, transport = sys.argv[5:]
    settings = Settings.load(Path(configuration), [f"client.transports={transport}"])
    with BlockingStore(settings.client()) as store:
        run(ApiFront(store), directory, seed, first)


def run(front: Front, directory: str, seed: int, first: int) -> None:
    index = first
    while True:
        try:
            step(front, directory, seed, index)
            if index - KEPT >= first:
                front.remove(f"{directory}/{index - KEPT}")
                print(f"- {index - KEPT}", flush=True)
        except (OSError, CrailError) as error:
            print(f"! {index} {type(error).__name__}: {error}", flush=True)
        index += 1


def step(front: Front, directory: str, seed: int, index: int) -> None:
    temporary = f"{directory}/{index}.part"
    front.write(temporary, content(seed, index))
    print(f"+ {index}", flush=True)
    front.rename(temporary, f"{directory}/{index}")
    print(f"> {index}", flush=True)


def _pieces(data: bytes) -> list[bytes]:
    length = max(1, len(data) // 3)
    return [data[offset : offset + length] for offset in range(0, len(data), length)]


if __name__ == "__main__":
    main()
