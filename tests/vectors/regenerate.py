"""Writes the golden frames: ``python -m tests.vectors.regenerate`` from the project's root.

``frames.json`` holds one frame for the request and the reply of each opcode and for each error;
``handshake.json`` one whole handshake. Any implementation of the protocol must decode these bytes
to these fields, and encode the fields to the same bytes.

In ``fields`` a record is an object, bytes are ``{"hex": "..."}``, enumerations are their numbers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec

from crailfs.config import Credentials
from crailfs.errors import ERRORS_BY_CODE
from crailfs.records import (
    ANY_TIER,
    Attributes,
    BlockHeader,
    Durability,
    Extent,
    HeaderChange,
    Location,
    NodeKind,
    PlacedRegion,
    Placement,
    RegionInfo,
    Run,
    StorageClass,
    StorageServerInfo,
    Tier,
)
from crailfs.wire import messages as m
from crailfs.wire.codec import error_frame, reply_frame, request_frame
from crailfs.wire.handshake import AcceptingSide, ConnectingSide
from crailfs.wire.header import PUSH
from crailfs.wire.messages import OPERATIONS, Message, Opcode

DIRECTORY = Path(__file__).parent
FRAMES = DIRECTORY / "frames.json"
HANDSHAKE = DIRECTORY / "handshake.json"

CLUSTER_ID = bytes(range(16))
SERVER_ID = bytes(range(16, 32))
REGION_UUID = bytes(range(32, 48))
PAYLOAD = bytes(range(256)) * 2
CREDENTIALS = Credentials(cluster_id=CLUSTER_ID, secret=b"a secret of the cluster")
CLIENT_NONCE = bytes(range(100, 132))
SERVER_NONCE = bytes(range(200, 232))
CLIENT_ID = 0xFEDC_BA98_7654_3210
EPOCH = 7

INO = (1 << 48) + 77
PLACEMENT = Placement(StorageClass(Tier.MEMORY, Tier.DISK), "rack-2", Durability.CLOSE, 16, 2)
FILE = Attributes(
    ino=INO, kind=NodeKind.FILE, mode=0o644, uid=1000, gid=100, nlink=1, size=70_000,
    block_count=2, atime_ns=1_700_000_000_123_456_789, mtime_ns=-1, ctime_ns=0,
    btime_ns=-(1 << 40), rdev=0, parent=0, data_version=9, placement=PLACEMENT,
)  # fmt: skip
DIRECTORY_NODE = Attributes(
    ino=1, kind=NodeKind.DIRECTORY, mode=0o1777, uid=0, gid=0, nlink=3, size=2, block_count=0,
    atime_ns=1, mtime_ns=2, ctime_ns=3, btime_ns=4, rdev=0, parent=1, data_version=5,
    placement=Placement(),
)  # fmt: skip
SYMLINK = Attributes(
    ino=5, kind=NodeKind.SYMLINK, mode=0o777, uid=0, gid=0, nlink=1, size=4, block_count=0,
    atime_ns=1, mtime_ns=2, ctime_ns=3, btime_ns=4, rdev=0, parent=0, data_version=0,
    placement=Placement(), target=b"/x/\xff",
)  # fmt: skip
EXTENT = Extent(
    file_block=3, block_count=2, tail_stored_bytes=4_464, tail_visible_bytes=4_000,
    replicas=(Location(4, 1 << 33, 12), Location(5, 0, 13)), checksums=bytes(range(16)),
)  # fmt: skip
RUN = Run(region=4, block=100, block_count=64, generation=12)
REGION = RegionInfo(REGION_UUID, Tier.MEMORY, 65_536, 16_384, False, "/dev/shm/region-0")
QUEUE_PAIR_END = m.QueuePairEnd(bytes(range(16)), 0x11, 0xABCDE, 3, True, 16)
SERVER = StorageServerInfo(
    id=SERVER_ID, host="node-1", rack="rack-2", unix_path="/run/crail/storage.sock",
    tcp_host="10.0.0.1", tcp_port=9061, boot_id="0f3c", alive=True, seconds_since_heard=0.25,
)  # fmt: skip
CLUSTER_MAP = m.ClusterMap(CLUSTER_ID, 65_536, (SERVER,), (PlacedRegion(4, SERVER_ID, REGION),))
STATISTICS = m.Statistics(65_536, 1_000_000, (m.TierStatistics(Tier.MEMORY, 16_384, 16_000),))

_connecting = ConnectingSide(CREDENTIALS, m.Role.CLIENT, CLIENT_ID, nonce=CLIENT_NONCE)
_accepting = AcceptingSide(CREDENTIALS, EPOCH, nonce=SERVER_NONCE)
CHALLENGE = _accepting.challenge(_connecting.hello)
PROOF = _connecting.answer(CHALLENGE)

SAMPLES: dict[Opcode, tuple[Message, Message]] = {
    Opcode.HELLO: (_connecting.hello, CHALLENGE),
    Opcode.PROOF: (PROOF, m.Welcome(True, 5_000)),
    Opcode.KEEP_ALIVE: (m.KeepAlive(1_234, (1, INO)), m.KeepAliveReply((INO,))),
    Opcode.INVALIDATE: (
        m.Invalidate((m.Invalidation(1, b"name", False), m.Invalidation(INO, b"", True))),
        m.InvalidateReply((INO,)),
    ),
    Opcode.END_SESSION: (m.EndSession(), m.Empty()),
    Opcode.RELEASE_INODES: (m.ReleaseInodes((INO, 2)), m.Empty()),
    Opcode.LOOKUP: (m.Lookup(1, b"na\xc3\xafve \xff"), FILE),
    Opcode.GET_ATTRIBUTES: (m.GetAttributes(5), SYMLINK),
    Opcode.SET_ATTRIBUTES: (m.SetAttributes(INO, mode=0o600, atime_ns=-5), FILE),
    Opcode.CREATE_NODE: (
        m.CreateNode(
            1,
            b"new",
            NodeKind.FILE,
            0o640,
            1000,
            100,
            exclusive=False,
            storage_class=StorageClass(Tier.MEMORY, Tier.MEMORY),
            location="node-1",
            durability=Durability.CLOSE,
            allocation_blocks=8,
        ),
        m.CreateReply(FILE, True),
    ),
    Opcode.REMOVE_NODE: (
        m.RemoveNode(1, b"old", False, not_open=INO),
        m.RemoveReply(INO, 0, False, DIRECTORY_NODE),
    ),
    Opcode.RENAME_NODE: (
        m.RenameNode(1, b"from", 2, b"to", m.RenameFlag.NO_REPLACE, not_open=3),
        m.RenameReply(FILE, 3, True, DIRECTORY_NODE, DIRECTORY_NODE),
    ),
    Opcode.LINK_NODE: (m.LinkNode(INO, 1, b"second name"), FILE),
    Opcode.READ_DIRECTORY: (
        m.ReadDirectory(1, b"after", 1_024),
        m.DirectoryPage((m.DirectoryEntry(b"file", FILE), m.DirectoryEntry(b"s", SYMLINK)), True),
    ),
    Opcode.GET_XATTR: (m.GetXattr(INO, b"user.note"), m.XattrValue(b"\0value")),
    Opcode.SET_XATTR: (m.SetXattr(INO, b"user.note", b"v", m.XattrFlag.CREATE), m.Empty()),
    Opcode.REMOVE_XATTR: (m.RemoveXattr(INO, b"user.note"), m.Empty()),
    Opcode.LIST_XATTR: (m.ListXattr(INO), m.XattrNames((b"user.a", b"user.b"))),
    Opcode.GET_STATISTICS: (m.GetStatistics(), STATISTICS),
    Opcode.GET_EXTENTS: (m.GetExtents(INO, 0, 128), m.ExtentPage((EXTENT,), 128, FILE)),
    Opcode.GRANT_BLOCKS: (m.GrantBlocks(ANY_TIER, "", "node-1", 256, 64), m.Grant((RUN,))),
    Opcode.RETURN_BLOCKS: (m.ReturnBlocks((RUN,)), m.Empty()),
    Opcode.COMMIT_FILE: (
        m.CommitFile(INO, (EXTENT,), (m.BaseBlock(3, 11, 7, 40),), 70_000, -1, (RUN,), True),
        FILE,
    ),
    Opcode.PUT_KEY_VALUE: (m.PutKeyValue(2, b"key", 0o644, 0, 0, 8_000, (EXTENT,), (RUN,)), FILE),
    Opcode.SYNC_METADATA: (m.SyncMetadata(), m.Empty()),
    Opcode.REGISTER_STORAGE: (
        m.RegisterStorage(SERVER, (REGION,)),
        m.RegisterReply((4,), (CLIENT_ID,)),
    ),
    Opcode.STORAGE_HEARTBEAT: (
        m.StorageHeartbeat(SERVER_ID, (m.RegionState(4, 8_192, (17,)),), (CLIENT_ID,)),
        m.HeartbeatReply(True, (), (400,)),
    ),
    Opcode.GET_CLUSTER_MAP: (m.GetClusterMap(), CLUSTER_MAP),
    Opcode.GET_STATUS: (
        m.GetStatus(),
        m.Status(CLUSTER_MAP, STATISTICS, 3, EPOCH, 1.5, {"requests": 12_345}),
    ),
    Opcode.AUDIT: (m.Audit(), m.AuditReply(("I1: block 7 is lost",), {"nodes": 2})),
    Opcode.ATTACH_REGIONS: (
        m.AttachRegions(CLIENT_ID),
        m.AttachReply((m.AttachedRegion(4, Tier.MEMORY, 65_536, 16_384, 4_096, m.Access.MAP),)),
    ),
    Opcode.READ_BLOCKS: (m.ReadBlocks(4, 1 << 40, len(PAYLOAD)), m.Empty()),
    Opcode.WRITE_BLOCKS: (m.WriteBlocks(4, 65_536, 12), m.Empty()),
    Opcode.FLUSH_REGION: (m.FlushRegion(4), m.FlushReply(False)),
    Opcode.STORAGE_STATUS: (
        m.StorageStatus(),
        m.StorageStatusReply(
            {"bytes_read": 1 << 40},
            (m.ClientConnection(CLIENT_ID, "10.0.0.2:50000", "rdma", m.FlushRung.RDMA_FLUSH),),
        ),
    ),
    Opcode.REPORT_FAILED: (m.ReportFailed(4, 65_536, 4_096), m.Empty()),
    Opcode.READ_HEADERS: (
        m.ReadHeaders(4, 16, 1_024),
        m.HeaderPage((BlockHeader(17, INO, 3, 12, 4_464, 4_000, 1 << 63),), 16_384),
    ),
    Opcode.CONNECT_QUEUE_PAIR: (
        m.ConnectQueuePair(QUEUE_PAIR_END),
        m.QueuePairReply(
            QUEUE_PAIR_END, (m.RemoteRegion(4, 1 << 46, 0x1234, 1 << 30, True, True),)
        ),
    ),
    Opcode.FETCH_HEADER_CHANGES: (
        m.FetchHeaderChanges(SERVER_ID, 7, 4_096),
        m.HeaderChanges(
            (
                HeaderChange(4, 100, 2, INO, 3, 12, 4_464, 4_000, bytes(range(16))),
                HeaderChange(4, 90, 5, 0),
            ),
            9,
            True,
        ),
    ),
    Opcode.BEGIN_SALVAGE: (m.BeginSalvage(INO + 1, 13), m.Empty()),
    Opcode.SALVAGE_FILE: (m.SalvageFile(INO, 70_000, (EXTENT,)), m.Empty()),
    Opcode.END_SALVAGE: (m.EndSalvage((4,)), m.Empty()),
    Opcode.NEXT_MOVES: (
        m.NextMoves(SERVER_ID, 16),
        m.Moves((m.Move(FILE, EXTENT, Tier.NVME),)),
    ),
    Opcode.MOVE_EXTENT: (m.MoveExtent(INO, EXTENT, (EXTENT,)), m.Empty()),
}


def fields_of(value: Any) -> Any:
    """``value`` as JSON holds it."""
    if isinstance(value, msgspec.Struct):
        return {name: fields_of(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, bytes):
        return {"hex": value.hex()}
    if isinstance(value, tuple):
        return [fields_of(item) for item in value]
    if isinstance(value, dict):
        return {key: fields_of(item) for key, item in value.items()}
    if isinstance(value, int) and not isinstance(value, bool):
        return int(value)
    return value


def _vector(name: str, frame: bytes, payload: bytes, message: Message | None) -> dict[str, Any]:
    return {
        "name": name,
        "frame": frame.hex(),
        "payload": payload.hex(),
        "message": None if message is None else type(message).__name__,
        "fields": None if message is None else fields_of(message),
    }


def frame_vectors() -> list[dict[str, Any]]:
    vectors = []
    for opcode, (request, reply) in SAMPLES.items():
        operation, request_id = OPERATIONS[opcode], 1_000 + opcode
        sent = PAYLOAD if operation.request_payload else b""
        answered = PAYLOAD if operation.reply_payload else b""
        flags = PUSH if opcode is Opcode.INVALIDATE else 0
        frame = request_frame(opcode, request_id, request, payload_bytes=len(sent), flags=flags)
        vectors.append(
            _vector(f"{opcode.name} request", frame, sent, request)
            | {"flags": flags, "opcode": int(opcode), "request_id": request_id}
        )
        frame = reply_frame(request_id, reply, payload_bytes=len(answered), flags=flags)
        vectors.append(
            _vector(f"{opcode.name} reply", frame, answered, reply)
            | {"flags": 1 | flags, "opcode": int(opcode), "status": 0, "request_id": request_id}
        )
    for code, kind in ERRORS_BY_CODE.items():
        text = f"what happened, to what, what to do: {kind.__name__} ü"
        vectors.append(
            _vector(f"{kind.__name__} reply", error_frame(2_000 + code, kind(text)), b"", None)
            | {"flags": 5, "status": code, "request_id": 2_000 + code, "text": text}
        )
    return vectors


def handshake_vector() -> dict[str, Any]:
    return {
        "secret": CREDENTIALS.secret.hex(),
        "hello": fields_of(_connecting.hello),
        "challenge": fields_of(CHALLENGE),
        "proof": fields_of(PROOF),
    }


def text_of(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FRAMES.write_text(text_of(frame_vectors()))
    HANDSHAKE.write_text(text_of(handshake_vector()))
