"""A writing load: run as a process on a directory, it reports each acknowledged step on stdout.

    python -m tests.faults.load DIRECTORY SEED

``+ I`` file I is written and closed; ``> I`` it is renamed to its final name; ``- I`` it is gone;
``! I ERRNO`` a step on file I failed. The bytes of file I follow from SEED and I alone.
"""

from __future__ import annotations

import os
import random
import sys

KEPT = 60
"""So many files exist at a time; older ones are removed."""


def content(seed: int, index: int) -> bytes:
    """What file ``index`` holds: from nothing up to 1.5 MB, mostly small."""
    choice = random.Random(f"{seed}/{index}")
    size = choice.choice((0, 1, 100, 4096, 65_536, 65_537, 70_000, 200_000, 1_500_000))
    return choice.randbytes(size)


def main() -> None:
    directory, seed = sys.argv[1], int(sys.argv[2])
    index = int(sys.argv[3])
    while True:
        try:
            step(directory, seed, index)
        except OSError as error:
            print(f"! {index} {error.errno}", flush=True)
        index += 1


def step(directory: str, seed: int, index: int) -> None:
    temporary = f"{directory}/{index}.part"
    data = content(seed, index)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        piece = max(1, len(data) // 3)
        for offset in range(0, len(data), piece):
            written = os.write(descriptor, data[offset : offset + piece])
            assert written == len(data[offset : offset + piece])
    finally:
        os.close(descriptor)
    print(f"+ {index}", flush=True)
    os.rename(temporary, f"{directory}/{index}")
    print(f"> {index}", flush=True)
    if index >= KEPT:
        os.unlink(f"{directory}/{index - KEPT}")
        print(f"- {index - KEPT}", flush=True)


if __name__ == "__main__":
    main()
