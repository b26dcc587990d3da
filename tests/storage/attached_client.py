"""A client process that attaches to a storage server and then only waits to be ended.

Arguments: the server's Unix socket, the client id.
"""

from __future__ import annotations

import sys

import trio

from crailfs.net.client import RpcClient
from crailfs.wire.messages import AttachRegions, Opcode, Role
from tests.storage.cluster import CREDENTIALS


async def main(unix_path: str, client_id: int) -> None:
    client = RpcClient(f"unix:{unix_path}", CREDENTIALS, role=Role.CLIENT, client_id=client_id)
    async with trio.open_nursery() as nursery:
        await nursery.start(client.run)
        _, fds = await client.call_with_fds(Opcode.ATTACH_REGIONS, AttachRegions(client_id))
        nursery.cancel_scope.cancel()
    assert fds
    print("attached", flush=True)
    sys.stdin.read()


trio.run(main, sys.argv[1], int(sys.argv[2]))
