"""A storage server for tests: in this process or one of its own, below a metadata server that only
knows how to register."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from pathlib import Path

import msgspec
import trio

from crailfs.config import ClientConfig, Credentials, RegionConfig, StorageConfig
from crailfs.limits import LEASE_MS
from crailfs.net import server as net_server
from crailfs.net.server import Peer
from crailfs.records import PlacedRegion, StorageServerInfo, Tier
from crailfs.units import KIB, MIB
from crailfs.wire.messages import (
    ClusterMap,
    GetClusterMap,
    HeartbeatReply,
    Message,
    Opcode,
    RegisterReply,
    RegisterStorage,
    StorageHeartbeat,
    Welcome,
)
from storage_server.server import serve

CREDENTIALS = Credentials(cluster_id=b"c" * 16, secret=b"a secret of the tests")
BLOCK = 64 * KIB
REGION_SIZE = 16 * MIB


class FakeMetadata:
    """Gives regions their ids and records what storage servers report."""

    def __init__(self) -> None:
        self.servers: dict[bytes, StorageServerInfo] = {}
        self.regions: dict[bytes, PlacedRegion] = {}
        self.registrations = 0
        self.known = True
        self.fence: tuple[int, ...] = ()
        self.high_water_blocks = 0
        self.heartbeats: list[StorageHeartbeat] = []
        self.address = ""
        self._changed = trio.Event()

    async def wait_for(
        self, condition: Callable[[StorageHeartbeat], bool], *, after: int | None = None
    ) -> StorageHeartbeat:
        """The first heartbeat from now on (or after the first ``after``) that has ``condition``."""
        seen = len(self.heartbeats) if after is None else after
        with trio.fail_after(10):
            while True:
                for heartbeat in self.heartbeats[seen:]:
                    if condition(heartbeat):
                        return heartbeat
                seen = len(self.heartbeats)
                await self._changed.wait()

    async def wait_registered(self, count: int) -> None:
        """Until storage servers have registered ``count`` times in all."""
        with trio.fail_after(20):
            while self.registrations < count:
                await self._changed.wait()

    def welcome(self, peer: Peer) -> Welcome:
        return Welcome(session_is_new=True, lease_ms=LEASE_MS)

    def payload_target(
        self, peer: Peer, opcode: Opcode, request: Message, byte_count: int
    ) -> memoryview:
        raise AssertionError("nothing with a payload is sent to the metadata server")

    def request(
        self,
        peer: Peer,
        opcode: Opcode,
        request_id: int,
        request: Message,
        payload: memoryview | None,
    ) -> None:
        peer.reply(request_id, self._answer(request))
        self._changed.set()
        self._changed = trio.Event()

    def _answer(self, request: Message) -> Message:
        match request:
            case GetClusterMap():
                return ClusterMap(
                    CREDENTIALS.cluster_id,
                    BLOCK,
                    tuple(self.servers.values()),
                    tuple(self.regions.values()),
                )
            case RegisterStorage(server, regions):
                self.registrations += 1
                self.known = True
                self.servers[server.id] = server
                for info in regions:
                    if info.uuid not in self.regions:
                        region_id = len(self.regions) + 1
                        self.regions[info.uuid] = PlacedRegion(region_id, server.id, info)
                ids = tuple(self.regions[info.uuid].id for info in regions)
                return RegisterReply(ids, self.fence)
            case StorageHeartbeat():
                self.heartbeats.append(request)
                if not self.known:
                    return HeartbeatReply(False, (), ())
                high_water = tuple(self.high_water_blocks for _ in request.regions)
                return HeartbeatReply(True, self.fence, high_water)
        raise AssertionError(f"unexpected {request}")

    def batch_done(self) -> None:
        pass

    def disconnected(self, peer: Peer) -> None:
        pass

    @contextlib.asynccontextmanager
    async def running(self, directory: Path) -> AsyncIterator[FakeMetadata]:
        async with trio.open_nursery() as nursery:
            bound = await nursery.start(
                partial(
                    net_server.serve,
                    [self.address or f"unix:{directory}/metadata.sock"],
                    self,
                    CREDENTIALS,
                    epoch=1,
                    operations=frozenset(
                        {
                            Opcode.GET_CLUSTER_MAP,
                            Opcode.REGISTER_STORAGE,
                            Opcode.STORAGE_HEARTBEAT,
                        }
                    ),
                )
            )
            self.address = bound[0]
            yield self
            nursery.cancel_scope.cancel()

    @property
    def server(self) -> StorageServerInfo:
        """The only storage server."""
        (server,) = self.servers.values()
        return server

    def region_id(self, tier: Tier) -> int:
        (found,) = (placed.id for placed in self.regions.values() if placed.info.tier == tier)
        return found


def storage_config(
    directory: Path, metadata: FakeMetadata, tiers: Sequence[Tier] = (Tier.MEMORY, Tier.DISK)
) -> StorageConfig:
    return StorageConfig(
        state=directory / "state",
        metadata=metadata.address,
        listen=(f"unix:{directory}/storage.sock", "127.0.0.1:0"),
        host="testhost",
        move_bytes_per_second=0,
        regions=tuple(
            RegionConfig(tier=tier, path=directory / tier.name.lower(), size_bytes=REGION_SIZE)
            for tier in tiers
        ),
        credentials=CREDENTIALS,
    )


def client_config(
    metadata: FakeMetadata, *transports: str, timeout_ms: int = 5_000
) -> ClientConfig:
    return ClientConfig(
        metadata=metadata.address,
        credentials=CREDENTIALS,
        transports=transports or ("local", "tcp"),
        operation_timeout_ms=timeout_ms,
    )


@contextlib.asynccontextmanager
async def storage_running(config: StorageConfig, metadata: FakeMetadata) -> AsyncIterator[None]:
    """The storage server as a task of this process, with all its memory provisioned."""
    async with trio.open_nursery() as nursery:
        seen = len(metadata.heartbeats)
        await nursery.start(partial(serve, config))
        await provisioned(metadata, after=seen)
        yield
        nursery.cancel_scope.cancel()


async def provisioned(metadata: FakeMetadata, *, after: int) -> None:
    await metadata.wait_for(
        lambda heartbeat: all(
            state.usable_blocks == REGION_SIZE // BLOCK for state in heartbeat.regions
        )
    )


class StorageProcess:
    """The storage server as a process of its own, to be killed."""

    def __init__(self, config: StorageConfig, directory: Path) -> None:
        self._config_path = directory / "storage.msgpack"
        self._config_path.write_bytes(msgspec.msgpack.encode(config, enc_hook=str))
        self._child: subprocess.Popen[bytes] | None = None

    async def start(self, metadata: FakeMetadata) -> None:
        seen, registrations = len(metadata.heartbeats), metadata.registrations
        self._spawn()
        await metadata.wait_registered(registrations + 1)
        await provisioned(metadata, after=seen)

    def _spawn(self) -> None:
        self._child = subprocess.Popen(
            [sys.executable, "-m", "tests.storage.cluster", str(self._config_path)]
        )

    def kill(self) -> None:
        """As a crash would end it."""
        if self._child is not None:
            self._child.send_signal(signal.SIGKILL)
            self._child.wait(10)
            self._child = None


def main(config_path: str) -> None:
    config = msgspec.msgpack.decode(
        Path(config_path).read_bytes(), type=StorageConfig, dec_hook=lambda kind, text: kind(text)
    )
    trio.run(partial(serve, config))


if __name__ == "__main__":
    main(sys.argv[1])
