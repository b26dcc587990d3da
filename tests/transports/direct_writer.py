"""A client process that writes all blocks of a region with direct I/O, over and over, many at once.

Arguments: the server's description in JSON, the region's id, the client id.
"""

from __future__ import annotations

import itertools
import os
import sys

import msgspec
import trio

from crailfs.config import ClientConfig
from crailfs.records import StorageServerInfo
from crailfs.transports import connect
from tests.storage.cluster import BLOCK, CREDENTIALS, REGION_SIZE


async def main(described: str, region: int, client_id: int) -> None:
    server = msgspec.json.decode(described, type=StorageServerInfo)
    config = ClientConfig(metadata="", credentials=CREDENTIALS, transports=("local",))
    offsets = itertools.cycle(range(0, REGION_SIZE, BLOCK))
    async with trio.open_nursery() as nursery:
        transport = await connect(server, config, client_id, nursery)
        await transport.write(region, 0, 1, os.urandom(BLOCK))
        print("writing", flush=True)

        async def write() -> None:
            while True:
                await transport.write(region, next(offsets), 1, os.urandom(BLOCK))

        for _ in range(32):
            nursery.start_soon(write)


trio.run(main, sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
