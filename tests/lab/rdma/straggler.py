"""A client that stops itself while its device works for it; run as a process by the tests.

Says ``stopping`` on stdout; after it was continued, how many of its writes failed and how.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import msgspec
import trio

from crailfs.config import ClientConfig
from crailfs.errors import CrailError
from crailfs.records import StorageServerInfo
from crailfs.transports import connect
from crailfs.transports.rdma import RdmaTransport
from crailfs.units import MIB

WRITES = 48
WRITE_BYTES = 4 * MIB
FILLING = b"\xaa"


class Orders(msgspec.Struct):
    server: StorageServerInfo
    config: ClientConfig
    client_id: int
    region: int
    region_bytes: int


async def run(orders: Orders) -> None:
    failures: list[str] = []
    data = FILLING * WRITE_BYTES

    async def write(transport: RdmaTransport, index: int) -> None:
        offset = index * WRITE_BYTES % orders.region_bytes
        try:
            await transport.write(orders.region, offset, 1, data)
        except CrailError as error:
            failures.append(type(error).__name__)

    async with trio.open_nursery() as connection:
        transport = await connect(orders.server, orders.config, orders.client_id, connection)
        assert isinstance(transport, RdmaTransport)
        async with trio.open_nursery() as nursery:
            for index in range(WRITES):
                nursery.start_soon(write, transport, index)
            while not transport.counters["doorbells"] > 1:  # the first was the connection's own
                await trio.lowlevel.checkpoint()
            print("stopping", flush=True)
            os.kill(os.getpid(), signal.SIGSTOP)
        await transport.close()
    print(f"{len(failures)} failed {sorted(set(failures))}", flush=True)


if __name__ == "__main__":
    stored = Path(sys.argv[1]).read_bytes()
    trio.run(run, msgspec.msgpack.decode(stored, type=Orders))
