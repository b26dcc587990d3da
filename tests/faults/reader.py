"""A reading load: run as a process, it reads files that ``load`` has finished and checks them.

    python -m tests.faults.reader SEED DIRECTORY...

Each line on stdout is ``. MILLISECONDS`` (a file was read and right) or ``! WHAT``. Every other
file is read past the kernel's page cache.
"""

from __future__ import annotations

import mmap
import os
import random
import sys
import time

from tests.faults.load import content

PAUSE_S = 0.01
"""Between two files: the reader must not take the whole machine."""
DIRECT_BUFFER_BYTES = 2_000_000


def main() -> None:
    seed, directories = int(sys.argv[1]), sys.argv[2:]
    choose = random.Random(seed)
    while True:
        directory = choose.choice(directories)
        started_s = time.monotonic()
        try:
            names = [name for name in os.listdir(directory) if name.isdecimal()]
            if names:
                check(directory, choose.choice(names), seed, direct=choose.random() < 0.5)
        except OSError as error:
            print(f"! {error}", flush=True)
        print(f". {(time.monotonic() - started_s) * 1000:.0f}", flush=True)
        time.sleep(PAUSE_S)


def check(directory: str, name: str, seed: int, *, direct: bool) -> None:
    try:
        data = read(f"{directory}/{name}", direct=direct)
    except FileNotFoundError:
        return  # the load has removed it since it was listed
    if data != content(seed, int(name)):
        print(f"! file {name} has other bytes ({len(data)})", flush=True)


def read(path: str, *, direct: bool) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0))
    try:
        with mmap.mmap(-1, DIRECT_BUFFER_BYTES) as buffer:
            length = 0
            while count := os.preadv(descriptor, [memoryview(buffer)[length:]], length):
                length += count
            return buffer[:length]
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    main()
