"""Nonsense on every port of real servers, from strangers and from peers that know the secret, while
a load runs through the mount: it must not notice, and the servers must not grow.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from msgspec.structs import replace

from crailfs.config import Credentials
from crailfs.errors import AuthenticationError, CrailError
from crailfs.limits import HANDSHAKE_TIMEOUT_MS
from crailfs.net.ratelimit import LINES_PER_PERIOD, PERIOD_S
from crailfs.records import Extent, Location, NodeKind, Run
from crailfs.units import MIB
from crailfs.wire.codec import request_frame
from crailfs.wire.messages import (
    AttachRegions,
    BaseBlock,
    CommitFile,
    CreateNode,
    CreateReply,
    FlushRegion,
    GetExtents,
    GetStatistics,
    Grant,
    GrantBlocks,
    KeepAlive,
    Lookup,
    Message,
    Opcode,
    PutKeyValue,
    ReadBlocks,
    ReadDirectory,
    RegionState,
    ReleaseInodes,
    ReturnBlocks,
    Role,
    StorageHeartbeat,
    WriteBlocks,
)
from tests.faults.hostile import HostilePeer, send_mutations
from tests.faults.running import Load, Reading
from tests.net.test_bad_input import STRANGERS_NONSENSE
from tests.support.process_cluster import ProcessCluster, process_cluster
from tests.vectors.regenerate import SAMPLES

SEED = int(os.environ.get("CRAIL_TEST_SEED", "20261120"))
GROWTH_MAX_BYTES = 48 * MIB
"""Of a server's resident memory: 1,000 silent connections to each port take about 10 MiB, and the
replies and rows of what hostile peers did some more."""
MUTATIONS = 1_000
"""For each role at each port that takes it."""
SERVERS = ("metadata", "storage")


class System(NamedTuple):
    cluster: ProcessCluster
    credentials: Credentials

    @property
    def ports(self) -> list[str]:
        return [address for name in SERVERS for address in self.cluster.running[name].addresses]

    def peer(self, server: str, role: Role = Role.CLIENT, client_id: int = 99) -> HostilePeer:
        address = self.cluster.running[server].addresses[0]
        return HostilePeer(address).handshake(self.credentials, role, client_id)


@pytest.fixture
def system(tmp_path: Path) -> Iterator[System]:
    """At the end all is as sound, as small and as busy as it was at the beginning."""
    with process_cluster(tmp_path) as cluster, contextlib.ExitStack() as ending:
        load = Load(cluster, "load", SEED)
        load.directory.mkdir()
        load.start()
        ending.callback(load.end)
        reading = Reading([load.directory], SEED)
        ending.callback(reading.kill)
        load.acknowledged(300)
        before = {name: _resident_bytes(cluster, name) for name in SERVERS}
        started_s = time.monotonic()
        yield System(cluster, cluster.client_config().credentials)
        elapsed_s = time.monotonic() - started_s
        load.acknowledged(30)
        load.end()
        assert not load.errors, load.errors
        load.check()
        assert reading.end() > 0
        for name in SERVERS:
            grown = _resident_bytes(cluster, name) - before[name]
            print(f"{name} server grew by {grown / MIB:.1f} MiB")
            assert grown < GROWTH_MAX_BYTES, f"{name} server grew by {grown} bytes"
            _check_log(cluster.log(name), elapsed_s)
        cluster.audit(data=True)


def _resident_bytes(cluster: ProcessCluster, name: str) -> int:
    """Without what is mapped from files: regions and LMDB."""
    status = Path(f"/proc/{cluster.running[name].pid}/status").read_text()
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024


def _check_log(text: str, elapsed_s: float) -> None:
    assert "Traceback" not in text, text[-3000:]
    faults = [line for line in text.splitlines() if "crailfs.net.server" in line]
    assert len(faults) <= (elapsed_s / PERIOD_S + 2) * (LINES_PER_PERIOD + 1)


@pytest.mark.fault
@pytest.mark.mount
@pytest.mark.slow
@pytest.mark.timeout(120)
def test_strangers(system: System) -> None:
    choose = random.Random(SEED)
    for port in system.ports:
        for name, nonsense in STRANGERS_NONSENSE.items():
            with HostilePeer(port) as peer:
                peer.sock.sendall(nonsense)
                assert peer.is_cut_off(), f"{port}: {name}"
        for _ in range(50):
            with HostilePeer(port) as peer, contextlib.suppress(ConnectionError):
                peer.sock.sendall(choose.randbytes(choose.randrange(1, 20_000)))
        wrong = replace(system.credentials, secret=b"another secret of 32 bytes......")
        with HostilePeer(port) as peer, pytest.raises(AuthenticationError):
            peer.handshake(wrong, Role.CLIENT, 1)
    for name in SERVERS:
        assert "crailfs.net.server" in system.cluster.log(name)


@pytest.mark.fault
@pytest.mark.mount
@pytest.mark.slow
@pytest.mark.timeout(120)
def test_silent_and_slow_strangers(system: System) -> None:
    """They are cut off when the handshake's time is over, and newcomers are served meanwhile."""
    with contextlib.ExitStack() as stack:
        silent = [
            stack.enter_context(HostilePeer(port)) for port in system.ports for _ in range(1_000)
        ]
        drips = [threading.Thread(target=_drip, args=(port,)) for port in system.ports]
        for drip in drips:
            drip.start()
        for name in SERVERS:
            with system.peer(name, Role.OPERATOR):
                pass
        for drip in drips:
            drip.join(2 * HANDSHAKE_TIMEOUT_MS / 1000)
            assert not drip.is_alive(), "a slow sender was not cut off"
        for peer in silent:
            assert peer.is_cut_off()


def _drip(port: str) -> None:
    """One byte at a time of what would be a good start, until it is cut off."""
    frame = request_frame(Opcode.HELLO, 0, SAMPLES[Opcode.HELLO][0])
    with HostilePeer(port) as peer, contextlib.suppress(ConnectionError):
        for byte in frame[:-1]:
            peer.sock.sendall(bytes([byte]))
            time.sleep(0.2)


def _bad_requests(directory: int, file: int, granted: Run) -> list[tuple[Opcode, Message]]:
    """Well-formed, and impossible. The session has ``granted`` and nothing else."""

    def extent(
        run: Run = granted, *, file_block: int = 0, block_count: int = 1, stored: int = 100,
        visible: int = 100, checksums: bytes = bytes(8), replicas: int = 1,
    ) -> Extent:  # fmt: skip
        place = Location(run.region, run.block, run.generation)
        return Extent(file_block, block_count, stored, visible, (place,) * replicas, checksums)

    def commit(*extents: Extent, **fields: object) -> tuple[Opcode, Message]:
        request = CommitFile(file, extents, (), minimum_size=100, mtime_ns=0)
        return Opcode.COMMIT_FILE, replace(request, **fields)

    def returned(run: Run) -> tuple[Opcode, Message]:
        return Opcode.RETURN_BLOCKS, ReturnBlocks((run,))

    huge = 1 << 62
    return [
        commit(extent(replace(granted, block=granted.block + granted.block_count))),
        commit(extent(replace(granted, region=999))),
        commit(extent(replace(granted, region=-1))),
        commit(extent(replace(granted, block=huge))),
        commit(extent(replace(granted, block=-1))),
        commit(extent(replace(granted, generation=granted.generation + 1))),
        commit(extent(replace(granted, generation=0))),
        commit(extent(block_count=0, checksums=b"")),
        commit(extent(block_count=-1)),
        commit(extent(block_count=huge)),
        commit(extent(block_count=2, checksums=bytes(8))),
        commit(extent(checksums=b"")),
        commit(extent(checksums=bytes(800))),
        commit(extent(stored=0)),
        commit(extent(stored=-1)),
        commit(extent(stored=65_537)),
        commit(extent(visible=101)),
        commit(extent(visible=-1)),
        commit(extent(file_block=-1)),
        commit(extent(file_block=huge)),
        commit(extent(replicas=0)),
        commit(extent(replicas=2)),
        commit(extent(replicas=100)),
        commit(extent(), extent()),
        commit(extent(), extent(file_block=1)),
        commit(extent(file_block=1), extent(replace(granted, block=granted.block + 1))),
        commit(*(extent(file_block=n) for n in range(9_000))),
        commit(extent(), ino=huge),
        commit(extent(), ino=-1),
        commit(extent(), ino=directory),
        commit(extent(), minimum_size=-1),
        commit(extent(), minimum_size=(1 << 63) - 1),
        commit(extent(), mtime_ns=1 << 63),
        commit(extent(), unused=(granted,)),
        commit(extent(), unused=(replace(granted, region=999),)),
        commit(extent(), bases=(BaseBlock(huge, 1),)),
        commit(extent(), bases=(BaseBlock(-1, -1, -1, -1),)),
        returned(replace(granted, block_count=huge)),
        returned(replace(granted, block_count=-1)),
        returned(replace(granted, block=granted.block + granted.block_count)),
        returned(replace(granted, generation=granted.generation + 1)),
        (Opcode.RETURN_BLOCKS, ReturnBlocks((granted, granted))),
        (Opcode.GRANT_BLOCKS, replace(_grant_request(), block_count=huge)),
        (Opcode.GRANT_BLOCKS, replace(_grant_request(), block_count=-1)),
        (Opcode.GRANT_BLOCKS, replace(_grant_request(), contiguous_blocks=-1)),
        (Opcode.GRANT_BLOCKS, replace(_grant_request(), location="x" * 100_000)),
        (Opcode.PUT_KEY_VALUE, PutKeyValue(file, b"k", 0o644, 0, 0, 100, (extent(),))),
        (Opcode.PUT_KEY_VALUE, PutKeyValue(1, b"k", 0o644, 0, 0, huge, (extent(),))),
        (Opcode.GET_EXTENTS, GetExtents(file, -1, 1)),
        (Opcode.GET_EXTENTS, GetExtents(file, 0, -1)),
        (Opcode.READ_DIRECTORY, ReadDirectory(1, b"", -1)),
        (Opcode.READ_DIRECTORY, ReadDirectory(file, b"", 10)),
        (Opcode.LOOKUP, Lookup(1, b"n" * 256)),
        (Opcode.LOOKUP, Lookup(huge, b"n")),
        (Opcode.KEEP_ALIVE, KeepAlive(-1, ())),
        (Opcode.KEEP_ALIVE, KeepAlive(0, tuple(range(100_000)))),
        (Opcode.RELEASE_INODES, ReleaseInodes((-1,))),
        (Opcode.STORAGE_HEARTBEAT, StorageHeartbeat(bytes(16), (RegionState(1, 0, ()),), ())),
    ]


def _grant_request() -> GrantBlocks:
    request = SAMPLES[Opcode.GRANT_BLOCKS][0]
    assert isinstance(request, GrantBlocks)
    return replace(request, block_count=4)


@pytest.mark.fault
@pytest.mark.mount
@pytest.mark.slow
@pytest.mark.timeout(120)
def test_impossible_requests_of_known_clients(system: System) -> None:
    metadata = system.peer("metadata")
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: metadata.sock.close())  # noqa: PLW0108 (it is replaced below)
        create = CreateNode(1, b"victim", NodeKind.FILE, 0o644, 0, 0)
        created = metadata.call(Opcode.CREATE_NODE, create)
        grant = metadata.call(Opcode.GRANT_BLOCKS, _grant_request())
        assert isinstance(created, CreateReply) and isinstance(grant, Grant)
        ino, granted = created.attributes.ino, grant.runs[0]
        for opcode, request in _bad_requests(1, ino, granted):
            try:
                reply = metadata.call(opcode, request)
            except CrailError:
                continue
            except EOFError:
                metadata = system.peer("metadata")
                continue
            raise AssertionError(f"{str(request)[:300]} was answered with {str(reply)[:300]}")
        metadata.call(Opcode.GET_STATISTICS, GetStatistics())
    system.cluster.audit()

    huge = 1 << 62
    generation = granted.generation
    storage_requests: list[tuple[Opcode, Message, bytes]] = [
        (Opcode.READ_BLOCKS, ReadBlocks(1, -1, 10), b""),
        (Opcode.READ_BLOCKS, ReadBlocks(1, 0, -1), b""),
        (Opcode.READ_BLOCKS, ReadBlocks(1, 0, huge), b""),
        (Opcode.READ_BLOCKS, ReadBlocks(1, 0, 5 * MIB), b""),
        (Opcode.READ_BLOCKS, ReadBlocks(1, huge, 10), b""),
        (Opcode.READ_BLOCKS, ReadBlocks(1, 128 * MIB - 5, 10), b""),
        (Opcode.READ_BLOCKS, ReadBlocks(999, 0, 10), b""),
        (Opcode.WRITE_BLOCKS, WriteBlocks(1, -10, generation), bytes(100)),
        (Opcode.WRITE_BLOCKS, WriteBlocks(1, huge, generation), bytes(100)),
        (Opcode.WRITE_BLOCKS, WriteBlocks(1, 128 * MIB - 5, generation), bytes(100)),
        (Opcode.WRITE_BLOCKS, WriteBlocks(-1, 0, generation), bytes(100)),
        (Opcode.WRITE_BLOCKS, WriteBlocks(999, 0, generation), bytes(100)),
        (Opcode.WRITE_BLOCKS, WriteBlocks(1, 0, -1), bytes(100)),
        (Opcode.WRITE_BLOCKS, WriteBlocks(1, 0, huge), b""),
        (Opcode.FLUSH_REGION, FlushRegion(999), b""),
        (Opcode.ATTACH_REGIONS, AttachRegions(12_345), b""),
    ]
    with system.peer("storage") as storage:
        for opcode, request, payload in storage_requests:
            with pytest.raises(CrailError):
                storage.call(opcode, request, payload)
                raise AssertionError(f"{request} was carried out")


@pytest.mark.fault
@pytest.mark.mount
@pytest.mark.slow
@pytest.mark.timeout(120)
def test_mutated_requests_of_known_peers(system: System) -> None:
    """Each is answered, mostly with an error, or ends its connection: never silence."""
    print(f"seed {SEED}")
    choose = random.Random(SEED)
    handshake = {Opcode.HELLO, Opcode.PROOF}
    requests = {
        opcode: request for opcode, (request, _) in SAMPLES.items() if opcode not in handshake
    }
    # Space that is granted to nobody who uses it would be missing for the load.
    requests[Opcode.GRANT_BLOCKS] = replace(_grant_request(), block_count=1)
    # A storage server that does not exist would be given to the load to write to.
    requests[Opcode.REGISTER_STORAGE] = replace(requests[Opcode.REGISTER_STORAGE], regions=())
    for number, port in enumerate(system.ports):
        roles = [Role.CLIENT, Role.OPERATOR]
        if port in system.cluster.running["metadata"].addresses:
            roles.append(Role.STORAGE_SERVER)
        for role in roles:
            began_s = time.monotonic()
            outcome = send_mutations(
                port, system.credentials, requests, role=role, client_id=1_000 + number,
                count=MUTATIONS, choose=choose,
            )  # fmt: skip
            print(f"{port} {role.name}: {outcome}, {time.monotonic() - began_s:.1f} s")
            assert outcome.errors > MUTATIONS // 10
