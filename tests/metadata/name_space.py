"""A driver on a temporary state directory, with short methods for each operation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import xxhash

from crailfs.config import Credentials, MetadataConfig
from crailfs.errors import CrailError
from crailfs.records import (
    ANY_TIER,
    Attributes,
    Extent,
    Location,
    NodeKind,
    RegionInfo,
    StorageServerInfo,
    Tier,
)
from crailfs.units import ROOT_INODE
from crailfs.wire.messages import (
    CommitFile,
    CreateNode,
    CreateReply,
    DirectoryPage,
    GetAttributes,
    GetXattr,
    Grant,
    GrantBlocks,
    LinkNode,
    ListXattr,
    Lookup,
    Message,
    Opcode,
    ReadDirectory,
    RegionState,
    RegisterStorage,
    ReleaseInodes,
    RemoveNode,
    RemoveReply,
    RemoveXattr,
    RenameFlag,
    RenameNode,
    RenameReply,
    SetAttributes,
    SetXattr,
    StorageHeartbeat,
    XattrFlag,
)
from metadata_server import sessions
from metadata_server.driver import Driver, Outcome

BLOCK_SIZE_BYTES = 4096
CLIENT = 7
SERVER_ID = b"s" * 16


class Clock:
    """Moves on by a microsecond whenever it is asked."""

    def __init__(self, now_ns: int = 1_700_000_000_000_000_000) -> None:
        self.now_ns = now_ns

    def __call__(self) -> int:
        self.now_ns += 1_000
        return self.now_ns


def config(state: Path, *, cluster_id: bytes = b"") -> MetadataConfig:
    return MetadataConfig(
        state=state,
        listen=(),
        credentials=Credentials(cluster_id=cluster_id, secret=b"s" * 16),
        block_size_bytes=BLOCK_SIZE_BYTES,
    )


class NameSpace:
    """One client's operations; an error is raised, and the journal written after each."""

    def __init__(self, state: Path, clock: Clock | None = None) -> None:
        self.clock = clock or Clock()
        self.state = state
        self.driver = Driver.open(config(state), clock_ns=self.clock)
        self.client_id = CLIENT
        self.request_id = 0
        self.outcome = Outcome(Message())

    def do(self, opcode: Opcode, request: Message) -> Any:
        self.request_id += 1
        self.outcome = self.driver.execute(self.client_id, self.request_id, opcode, request)
        self.driver.write_batch()
        if isinstance(self.outcome.reply, CrailError):
            raise self.outcome.reply
        return self.outcome.reply

    def reopen(self) -> None:
        self.driver.close()
        self.driver = Driver.open(config(self.state), clock_ns=self.clock)

    def assert_sound(self) -> None:
        assert self.driver.audit().findings == ()

    # --- name space -----------------------------------------------------------------------------

    def lookup(self, parent: int, name: bytes) -> Attributes:
        node: Attributes = self.do(Opcode.LOOKUP, Lookup(parent, name))
        return node

    def attributes(self, ino: int) -> Attributes:
        node: Attributes = self.do(Opcode.GET_ATTRIBUTES, GetAttributes(ino))
        return node

    def set(self, ino: int, **changes: Any) -> Attributes:
        node: Attributes = self.do(Opcode.SET_ATTRIBUTES, SetAttributes(ino, **changes))
        return node

    def create(
        self,
        name: bytes,
        parent: int = ROOT_INODE,
        kind: NodeKind = NodeKind.FILE,
        mode: int = 0o644,
        uid: int = 10,
        gid: int = 20,
        **more: Any,
    ) -> Attributes:
        reply: CreateReply = self.do(
            Opcode.CREATE_NODE, CreateNode(parent, name, kind, mode, uid, gid, **more)
        )
        return reply.attributes

    def mkdir(self, name: bytes, parent: int = ROOT_INODE, **more: Any) -> int:
        return self.create(name, parent, more.pop("kind", NodeKind.DIRECTORY), 0o755, **more).ino

    def remove(self, name: bytes, parent: int = ROOT_INODE, **more: Any) -> RemoveReply:
        more.setdefault("directory", False)
        reply: RemoveReply = self.do(Opcode.REMOVE_NODE, RemoveNode(parent, name, **more))
        return reply

    def rmdir(self, name: bytes, parent: int = ROOT_INODE, **more: Any) -> RemoveReply:
        return self.remove(name, parent, directory=True, **more)

    def rename(
        self,
        parent: int,
        name: bytes,
        new_parent: int,
        new_name: bytes,
        flags: RenameFlag = RenameFlag.NONE,
        not_open: int = 0,
    ) -> RenameReply:
        reply: RenameReply = self.do(
            Opcode.RENAME_NODE, RenameNode(parent, name, new_parent, new_name, flags, not_open)
        )
        return reply

    def link(self, ino: int, new_name: bytes, new_parent: int = ROOT_INODE) -> Attributes:
        node: Attributes = self.do(Opcode.LINK_NODE, LinkNode(ino, new_parent, new_name))
        return node

    def page(self, ino: int, after_name: bytes = b"", entry_limit: int = 100) -> DirectoryPage:
        page: DirectoryPage = self.do(
            Opcode.READ_DIRECTORY, ReadDirectory(ino, after_name, entry_limit)
        )
        return page

    def names(self, ino: int = ROOT_INODE) -> list[bytes]:
        return [entry.name for entry in self.page(ino).entries]

    def release(self, *inodes: int) -> None:
        self.do(Opcode.RELEASE_INODES, ReleaseInodes(inodes))

    def get_xattr(self, ino: int, name: bytes) -> bytes:
        value: bytes = self.do(Opcode.GET_XATTR, GetXattr(ino, name)).value
        return value

    def set_xattr(
        self, ino: int, name: bytes, value: bytes, flags: XattrFlag = XattrFlag.NONE
    ) -> None:
        self.do(Opcode.SET_XATTR, SetXattr(ino, name, value, flags))

    def remove_xattr(self, ino: int, name: bytes) -> None:
        self.do(Opcode.REMOVE_XATTR, RemoveXattr(ino, name))

    def list_xattr(self, ino: int) -> tuple[bytes, ...]:
        names: tuple[bytes, ...] = self.do(Opcode.LIST_XATTR, ListXattr(ino)).names
        return names

    # --- data -----------------------------------------------------------------------------------

    def add_storage(self, block_count: int = 1024, tier: Tier = Tier.MEMORY) -> None:
        """A storage server with one region of memory or disk, and this client's session."""
        durable = tier is Tier.DISK
        region = RegionInfo(b"r" * 16, tier, BLOCK_SIZE_BYTES, block_count, durable, tier.name)
        server = StorageServerInfo(SERVER_ID, "host", "", "", "", 0, "boot")
        ids = self.do(Opcode.REGISTER_STORAGE, RegisterStorage(server, (region,))).region_ids
        states = tuple(RegionState(region_id, block_count, ()) for region_id in ids)
        self.do(Opcode.STORAGE_HEARTBEAT, StorageHeartbeat(SERVER_ID, states, ()))
        self.driver.run(lambda txn, _: sessions.open_session(txn, self.client_id, "host"))
        self.driver.write_batch()

    def write(self, ino: int, size_bytes: int, first_block: int = 0) -> Attributes:
        """Commit blocks from ``first_block`` on that hold ``size_bytes``."""
        block_count = -(-size_bytes // BLOCK_SIZE_BYTES)
        grant: Grant = self.do(
            Opcode.GRANT_BLOCKS, GrantBlocks(ANY_TIER, "", "host", block_count, block_count)
        )
        (run,) = grant.runs
        tail_bytes = size_bytes - (block_count - 1) * BLOCK_SIZE_BYTES
        extent = Extent(
            file_block=first_block,
            block_count=block_count,
            tail_stored_bytes=tail_bytes,
            tail_visible_bytes=tail_bytes,
            replicas=(Location(run.region, run.block, run.generation),),
            checksums=xxhash.xxh3_64_digest(b"")[::-1] * block_count,
        )
        end_bytes = first_block * BLOCK_SIZE_BYTES + size_bytes
        node: Attributes = self.do(
            Opcode.COMMIT_FILE, CommitFile(ino, (extent,), (), end_bytes, self.clock())
        )
        return node

    @property
    def free_blocks(self) -> int:
        return self.driver.audit().counts.get("free_blocks", 0)
