"""How a client reaches the blocks of one storage server: one Protocol, one module a way.

``local`` maps (memory) or opens (disk) the region's file itself, through descriptors that the
server passed over its Unix socket. ``rdma`` has the network cards copy between its own memory and
the server's. ``tcp`` asks the server for every read and write.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol

import trio

from crailfs.config import ClientConfig
from crailfs.errors import ConfigurationError, CrailError, FencedError, UnavailableError
from crailfs.net.sending import Buffer
from crailfs.records import StorageServerInfo
from crailfs.transports.local import LocalTransport
from crailfs.transports.rdma import RdmaTransport
from crailfs.transports.tcp import TcpTransport


class Transport(Protocol):
    """One storage server's regions, reached one way. Offsets are bytes from the first block.

    After a ``write`` that failed or was cancelled the bytes may still arrive later: its blocks
    must not be given back before the session ends.
    """

    name: str
    """As in ``ClientConfig.transports``."""
    write_piece_bytes: int
    """What is written without waiting for it goes out in pieces of at most this many bytes."""

    def in_place(self, region: int) -> bool:
        """Whether ``write`` is so cheap for small pieces at any offset of this region that writers
        need not collect whole blocks first, and returns when the bytes are there for all."""

    def stage(self, data: Buffer) -> Buffer:
        """``data``, or a copy in better memory, as something that stays as it is until it or parts
        of it have been given to ``write``."""

    async def read(self, region: int, offset: int, byte_count: int) -> Buffer:
        """Exactly ``byte_count`` bytes. May be a view of the region itself: nobody changes
        committed bytes, but drop it before its blocks are freed.

        Raises ``InvalidError`` for bytes that the region does not have, ``BlockLostError`` for a
        region that the server does not have, ``DamagedError`` if the device fails,
        ``UnavailableError`` if the server is not reached within the operation timeout.
        """

    async def write(self, region: int, offset: int, generation: int, data: Buffer) -> None:
        """Put ``data`` into blocks granted under ``generation``; any later read sees it.

        Raises as ``read`` does, and ``FencedError`` if the blocks were granted again since.
        """

    async def flush(self, region: int) -> bool:
        """Make this client's earlier writes to ``region`` as durable as its medium can.

        True: they outlive a power cut. Raises as ``read`` does.
        """

    async def close(self) -> None:
        """Give up the server: afterwards this client can change none of its blocks."""


async def connect(
    server: StorageServerInfo,
    config: ClientConfig,
    client_id: int,
    nursery: trio.Nursery,
    locate: Callable[[], Awaitable[StorageServerInfo]] | None = None,
) -> Transport:
    """The first of ``config.transports`` that works; its background tasks run in ``nursery``.

    ``local`` is only tried on the server's own host, known by the kernel's boot id. ``locate`` is
    asked where the server is when a connection to it cannot be made again. Raises
    ``UnavailableError``, which names each transport and why it cannot be used, and ``FencedError``
    if the client lost its session: it must begin another one under a new id.
    """
    failures: list[str] = []
    for name in config.transports:
        try:
            if name == "local":
                reason = _why_not_local(server)
                if reason is None:
                    return await LocalTransport.connect(server, config, client_id)
                failures.append(f"local: {reason}")
            elif name == "rdma":
                if server.rdma:
                    return await RdmaTransport.connect(server, config, client_id, nursery, locate)
                failures.append("rdma: the server does not offer it")
            elif name == "tcp":
                if server.tcp_port:
                    return await TcpTransport.connect(server, config, client_id, nursery, locate)
                failures.append("tcp: the server does not listen on it")
            else:
                raise ConfigurationError(
                    f"transports: {name!r} is not a transport; use 'local', 'rdma' and 'tcp'"
                )
        except (ConfigurationError, FencedError):
            raise
        except CrailError as error:
            failures.append(f"{name}: {error.message}")
    raise UnavailableError(
        f"storage server {server.id.hex()[:8]} on {server.host} cannot be reached ("
        + "; ".join(failures or ["no transport is configured"])
        + "). Check that it runs, and the key transports"
    )


def read_boot_id() -> str:
    """The kernel's boot id: processes that read the same one share their memory's host."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def _why_not_local(server: StorageServerInfo) -> str | None:
    if not server.unix_path:
        return "the server offers no Unix socket"
    if server.boot_id != read_boot_id():
        return "the server runs on another host"
    if not os.path.isdir(os.path.dirname(server.unix_path)):
        return f"{server.unix_path} is not in this process's view of the file system"
    return None
