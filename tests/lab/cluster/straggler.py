"""A client that stops itself while it writes a file by RDMA; run as a process by the tests.

    python3 -m tests.lab.cluster.straggler CONFIGURATION

First it prints the blocks that it was granted for the file. After it was continued: what became of
the file, and of another that it writes then.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import trio

from crailfs.client.grants import PoolKey
from crailfs.client.store import CrailStore
from crailfs.config import ClientConfig
from crailfs.config_file import Settings
from crailfs.errors import CrailError
from crailfs.records import Run
from crailfs.transports.rdma import RdmaTransport
from crailfs.units import MIB

FILLING = b"\xaa"
LOST = "/straggler-lost"
LATER = "/straggler-later"
_WRITE_BYTES = MIB
_WRITES = 24


async def run(config: ClientConfig) -> None:
    async with CrailStore.connect(config) as store:
        await store.write(LATER, b"before")
        (transport,) = store.filesystem.storage.transports
        assert isinstance(transport, RdmaTransport)
        grants = store.filesystem._grants
        granted: list[Run] = []
        take = grants.take

        async def noting(key: PoolKey, block_count: int) -> Run:
            granted.append(await take(key, block_count))
            return granted[-1]

        grants.take = noting  # type: ignore[method-assign]
        posted = transport.counters["writes"]
        try:
            async with await store.create(LOST) as file:
                for _ in range(_WRITES):
                    await file.write(FILLING * _WRITE_BYTES)
                    if transport.counters["writes"] > posted:
                        blocks = {
                            run.block + at for run in granted for at in range(run.block_count)
                        }
                        print(json.dumps(sorted(blocks)), flush=True)
                        os.kill(os.getpid(), signal.SIGSTOP)
                        posted = sys.maxsize
        except CrailError as error:
            print(f"{LOST}: {type(error).__name__}", flush=True)
        else:
            print(f"{LOST}: written", flush=True)
        await store.write(LATER, FILLING * _WRITE_BYTES)
        print(f"{LATER}: written", flush=True)


if __name__ == "__main__":
    trio.run(run, Settings.load(Path(sys.argv[1]), ["client.transports=rdma"]).client())
