"""What the tests ask of the other host; run there as a program.

    python3 -m tests.lab.cluster.there put PATH OFFSET SEED BYTES
    python3 -m tests.lab.cluster.there sum PATH
    python3 -m tests.lab.cluster.there check DEVICE STATE

``put`` writes ``content`` into a file, ``sum`` prints a file's SHA-256. ``check`` opens a region of
persistent memory whose storage server (of state directory STATE) is not running, compares the bytes
of every block that is some file's with the checksum in its header, and prints how many different
blocks of each inode there are.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tests.lab.rdma.load import content


def put(path: str, offset: str, seed: str, byte_count: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    data = content(int(seed), int(byte_count))
    assert os.pwrite(descriptor, data, int(offset)) == len(data)
    os.close(descriptor)


def sha256(path: str) -> None:
    with open(path, "rb", buffering=0) as file:
        print(hashlib.file_digest(file, "sha256").hexdigest())


def check(device: str, state: str) -> None:
    import trio  # slow to import, and of no use to the others

    from crailfs.config import RegionConfig
    from crailfs.limits import BLOCK_SIZE_DEFAULT_BYTES
    from crailfs.records import Tier
    from tests.support.region_audit import check_headers, open_offline, stored_headers

    async def verify() -> None:
        stored = json.loads((Path(state) / "server.json").read_text())
        medium = await open_offline(
            RegionConfig(tier=Tier.PMEM, path=Path(device), size_bytes=0),
            bytes.fromhex(stored["cluster_id"]),
            BLOCK_SIZE_DEFAULT_BYTES,
        )
        assert medium is not None
        assert medium.durable, medium.kind
        await check_headers(medium)
        places = {(header.ino, header.file_block) for header in await stored_headers(medium)}
        print(json.dumps(Counter(ino for ino, _ in places)))
        medium.close()

    trio.run(verify)


if __name__ == "__main__":
    commands: dict[str, Callable[..., None]] = {"put": put, "sum": sha256, "check": check}
    commands[sys.argv[1]](*sys.argv[2:])
