"""The smallest load and verification for ``scripts/lab power-loss``: a counter on each medium.

``load`` writes 1, 2, 3, ... to devdax (and flushes it with libpmem) and to the NVMe disk (and
syncs it), and says what it has written; ``verify`` asks that nothing that was said is lost.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from pathlib import Path

import xxhash

PAGE_BYTES = 4096
DEVDAX_BYTES = 2 << 20


class Counters:
    """The number on each medium, with a checksum: 0 where there is none."""

    def __init__(self) -> None:
        descriptor = os.open(os.environ["CRAIL_LAB_DEVDAX"], os.O_RDWR)
        self._pmem = mmap.mmap(descriptor, DEVDAX_BYTES)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._pmem))
        self._libpmem = ctypes.CDLL("libpmem.so.1")
        self._libpmem.pmem_persist.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
        self._nvme = os.open(os.environ["CRAIL_LAB_NVME"], os.O_RDWR | os.O_DIRECT)
        self._page = mmap.mmap(-1, PAGE_BYTES)

    def write(self, number: int) -> None:
        record = number.to_bytes(8, "little")
        record += xxhash.xxh3_64_digest(record)
        # Two places in turn, so that a record that was cut short leaves the one before.
        at = number % 2 * PAGE_BYTES
        self._pmem[at : at + 16] = record
        self._libpmem.pmem_persist(self._address + at, 16)
        self._page[:16] = record
        os.pwrite(self._nvme, self._page, at)
        os.fdatasync(self._nvme)

    def read(self) -> dict[str, int]:
        found = {"devdax": 0, "nvme": 0}
        for at in (0, PAGE_BYTES):
            os.preadv(self._nvme, [self._page], at)
            records = {"devdax": self._pmem[at : at + 16], "nvme": self._page[:16]}
            for medium, record in records.items():
                if xxhash.xxh3_64_digest(record[:8]) == record[8:]:
                    found[medium] = max(found[medium], int.from_bytes(record[:8], "little"))
        return found


def load() -> None:
    counters = Counters()
    number = max(counters.read().values())
    print("UNDER LOAD", flush=True)
    while True:
        number += 1
        counters.write(number)
        print(number, flush=True)


def verify() -> None:
    found = Counters().read()
    said = 0
    if "CRAIL_LAB_LAST_LOAD" in os.environ:
        lines = Path(os.environ["CRAIL_LAB_LAST_LOAD"]).read_text().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n") and line.strip().isdigit()]
        said = int(whole[-1]) if whole else 0
    print(f"said {said}, found {found}", flush=True)
    if not all(said <= number for number in found.values()):
        raise SystemExit(f"{said} had been written and synced; found {found}")


if __name__ == "__main__":
    {"load": load, "verify": verify}[sys.argv[1]]()
