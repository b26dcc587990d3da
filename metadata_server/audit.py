"""Recounts everything and says which invariants of ``schema.py`` do not hold.

Streams over the tables; what it keeps in memory is bounded by ``WINDOW_BLOCKS`` and
``WINDOW_NODES``: beyond them it walks the tables once more for each further window.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import groupby

from crailfs.limits import EXTENT_BLOCKS_MAX, REPLICAS_MAX
from crailfs.records import DATA_KINDS, Attributes, Extent, NodeKind
from crailfs.units import ROOT_INODE
from crailfs.wire.messages import AuditReply
from metadata_server import schema
from metadata_server.audit_windows import BlockWindow, LinkWindow, block_windows
from metadata_server.txn import Txn

FINDINGS_MAX = 1_000
_INO_BYTES = 8


def audit(txn: Txn) -> AuditReply:
    """Check all invariants; the findings are sentences for people, none if all is well."""
    return _Audit(txn).run()


class _Audit:
    def __init__(self, txn: Txn) -> None:
        self._txn = txn
        self._block_size_bytes: int = txn.state(b"block_size_bytes")
        self._findings: list[str] = []
        self._suppressed = 0
        self._counts: Counter[str] = Counter()

    def run(self) -> AuditReply:
        self._check_state()
        self._check_links()
        self._check_directories()
        self._check_orphans()
        self._check_xattrs()
        self._check_extents()
        self._check_free_runs()
        self._check_grants()
        self._check_header_log()
        self._check_blocks()
        if self._suppressed:
            self._findings.append(f"{self._suppressed} more findings are not shown")
        return AuditReply(tuple(self._findings), dict(self._counts))

    def _find(self, sentence: str) -> None:
        if len(self._findings) < FINDINGS_MAX:
            self._findings.append(sentence)
        else:
            self._suppressed += 1

    def _nodes(self) -> Iterator[Attributes]:
        return (schema.decode_attributes(value) for _, value in self._txn.scan(schema.NODES))

    # --- name space -----------------------------------------------------------------------------

    def _check_state(self) -> None:
        counted = self._txn.row_count(schema.NODES)
        stated = self._txn.state(b"node_count")
        if counted != stated:
            self._find(f"node_count is {stated}, there are {counted} nodes")
        last = self._txn.last(schema.NODES)
        if last is not None and schema.unpack_u64(last[0]) >= self._txn.state(b"next_ino"):
            self._find(f"inode {schema.unpack_u64(last[0])} is not below next_ino")

    def _check_links(self) -> None:
        """I3: as many entries point to each node as its nlink says, and none to no node."""
        nodes = self._nodes()
        window = LinkWindow(nodes)
        while True:
            for key, value in self._txn.scan(schema.ENTRIES):
                ino = schema.unpack_u64(value)
                if not window.count(ino):
                    where = f"{key[_INO_BYTES:]!r} of directory {schema.unpack_u64(key[:8])}"
                    self._find(f"entry {where} points to inode {ino}, which does not exist")
            for ino, expected, counted in window.differing():
                self._find(f"inode {ino} should have {expected} names and has {counted}")
            if window.is_last:
                return
            window = LinkWindow(nodes, after=window.last_ino)

    def _check_directories(self) -> None:
        """I3 (nlink of directories), I5, I7, and that every directory is below the root."""
        counts = self._counts
        for node in self._nodes():
            counts[f"{node.kind.name.lower()}_nodes"] += 1
            if node.nlink == 0 and not any(
                self._txn.scan_prefix(schema.ORPHANS, schema.node_key(node.ino))
            ):
                self._find(f"inode {node.ino} has no name and nobody holds it")
            if node.is_directory:
                self._check_directory(node)
        in_directories = counts["entries"]
        in_table = self._txn.row_count(schema.ENTRIES)
        if in_table != in_directories:
            self._find(f"{in_table - in_directories} entries are in no directory that exists")

    def _check_directory(self, node: Attributes) -> None:
        entries = subdirectories = 0
        for key, value in self._txn.scan_prefix(schema.ENTRIES, schema.node_key(node.ino)):
            entries += 1
            child = self._txn.find_node(schema.unpack_u64(value))
            if child is None:
                continue
            what = f"entry {key[_INO_BYTES:]!r} of directory {node.ino}"
            if child.is_directory:
                subdirectories += 1
                if child.parent != node.ino:
                    self._find(f"{what}: inode {child.ino} has {child.parent} as its parent")
            if not _may_hold(node.kind, child.kind):
                self._find(f"{what}: a {child.kind.name} cannot be in a {node.kind.name}")
        self._counts["entries"] += entries
        if node.size != entries:
            self._find(f"directory {node.ino} says {node.size} entries and has {entries}")
        nlink = 2 + subdirectories if node.nlink else 0
        if node.nlink != nlink or (not node.nlink and entries):
            self._find(
                f"directory {node.ino} has nlink {node.nlink}, {entries} entries and "
                f"{subdirectories} subdirectories"
            )
        if node.nlink and not self._reaches_root(node):
            self._find(f"directory {node.ino} cannot be reached from the root")

    def _reaches_root(self, node: Attributes) -> bool:
        above: Attributes | None = node
        for _ in range(self._txn.row_count(schema.NODES)):
            if above is None:
                return False
            if above.ino == ROOT_INODE:
                return True
            above = self._txn.find_node(above.parent)
        return False

    def _check_orphans(self) -> None:
        """I4."""
        for key, _ in self._txn.scan(schema.ORPHANS):
            ino, client = schema.unpack_ino_block(key)
            self._counts["orphans"] += 1
            node = self._txn.find_node(ino)
            if node is None:
                self._find(f"client {client:016x} holds inode {ino}, which does not exist")
            elif node.nlink:
                self._find(f"client {client:016x} holds inode {ino}, which has {node.nlink} names")

    def _check_xattrs(self) -> None:
        for prefix, rows in groupby(self._txn.scan(schema.XATTRS), _ino_of):
            self._counts["xattrs"] += sum(1 for _ in rows)
            if self._txn.get(schema.NODES, prefix) is None:
                self._find(f"inode {schema.unpack_u64(prefix)} has extended attributes and is gone")

    # --- extents --------------------------------------------------------------------------------

    def _check_extents(self) -> None:
        """I6."""
        for node in self._nodes():
            key = schema.node_key(node.ino)
            if node.block_count and not any(self._txn.scan_prefix(schema.EXTENTS, key)):
                self._find(f"inode {node.ino} says {node.block_count} blocks and has no extents")
        for prefix, rows in groupby(self._txn.scan(schema.EXTENTS), _ino_of):
            ino = schema.unpack_u64(prefix)
            file = self._txn.find_node(ino)
            if file is None or file.kind not in DATA_KINDS:
                self._find(f"inode {ino} has extents and is not a file")
                continue
            block_count = end_block = 0
            for key, value in rows:
                extent = schema.decode_extent(value)
                self._counts["extents"] += 1
                for broken in self._broken(file, key, extent, end_block):
                    self._find(f"inode {ino}, extent at file block {extent.file_block}: {broken}")
                block_count += extent.block_count
                end_block = extent.file_block + extent.block_count
            if block_count != file.block_count:
                self._find(f"inode {ino} says {file.block_count} blocks and has {block_count}")

    def _broken(
        self, node: Attributes, key: bytes, extent: Extent, previous_end: int
    ) -> Iterator[str]:
        """What is wrong with one extent."""
        if schema.unpack_ino_block(key)[1] != extent.file_block:
            yield "its key names another block"
        if extent.file_block < previous_end:
            yield f"overlaps the one before, which ends at {previous_end}"
        if not 1 <= extent.block_count <= EXTENT_BLOCKS_MAX:
            yield f"it has {extent.block_count} blocks"
        if len(extent.checksums) != 8 * extent.block_count:
            yield f"{len(extent.checksums)} bytes of checksums for {extent.block_count} blocks"
        if not 1 <= len(extent.replicas) <= REPLICAS_MAX:
            yield f"it has {len(extent.replicas)} replicas"
        visible, stored = extent.tail_visible_bytes, extent.tail_stored_bytes
        if not 0 < visible <= stored <= self._block_size_bytes:
            yield f"shows {visible} bytes of {stored} stored in its last block"
        shown_end = (extent.file_block + extent.block_count - 1) * self._block_size_bytes + visible
        if shown_end > node.size:
            yield f"shows bytes up to {shown_end}, the file has {node.size}"
        for place in extent.replicas:
            if not 0 < place.generation < self._txn.state(b"next_generation"):
                yield f"its generation {place.generation} was never given"

    # --- space ----------------------------------------------------------------------------------

    def _check_free_runs(self) -> None:
        """I2."""
        previous_region, previous_end = -1, 0
        for key, value in self._txn.scan(schema.FREE):
            region, block = schema.unpack_region_block(key)
            if region == previous_region and block <= previous_end:
                self._find(f"region {region}: the free runs before and at block {block} touch")
            previous_region, previous_end = region, block + schema.unpack_u64(value)

    def _check_grants(self) -> None:
        """I8."""
        for key, _ in self._txn.scan(schema.GRANTS):
            client = schema.unpack_owner_region_block(key)[0]
            if self._txn.get(schema.SESSIONS, schema.session_key(client)) is None:
                self._find(f"client {client:016x} has granted blocks and no session")

    def _check_header_log(self) -> None:
        """I10."""
        next_sequence = self._txn.state(b"next_header_change")
        infos = {
            schema.unpack_region(key): schema.decode_region(value).info
            for key, value in self._txn.scan(schema.REGIONS)
        }
        for key, value in self._txn.scan(schema.HEADER_LOG):
            region, sequence = schema.unpack_region_block(key)
            self._counts["header_changes"] += 1
            change, info = schema.decode_header_change(value), infos.get(region)
            settles = info is not None and info.durable and not change.ino
            if info is None or change.region != region or not (info.keeps_headers or settles):
                self._find(
                    f"header change {sequence} is of region {region}, which has no use for it"
                )
            if sequence >= next_sequence:
                self._find(f"header change {sequence} is not below next_header_change")

    def _check_blocks(self) -> None:
        """I1, I9, and that nothing is granted in an unclaimed region (I10)."""
        regions = {
            schema.unpack_region(key): schema.decode_region(value)
            for key, value in self._txn.scan(schema.REGIONS)
        }
        usable = {region: stored.usable_blocks for region, stored in regions.items()}
        sums: dict[tuple[int, str], int] = Counter()
        high_water: dict[int, int] = Counter()
        for number, window in enumerate(block_windows(usable)):
            for region, block, count, owner in self._owned():
                if number == 0:
                    if owner == "granted" and region in regions and regions[region].unclaimed:
                        self._find(f"region {region} is unclaimed, block {block} is granted")
                    sums[region, owner] += count
                    self._counts[f"{owner}_blocks"] += count
                    if owner not in ("free", "failed", "clearing"):
                        high_water[region] = max(high_water[region], block + count)
                self._claim(window, usable, region, block, count, owner)
            for region, block, count in window.unclaimed():
                self._find(
                    f"region {region}, blocks {block} to {block + count - 1}: nobody has them"
                )
        for region in regions:
            value = self._txn.get(schema.USAGE, schema.region_key(region))
            usage = schema.Usage() if value is None else schema.decode_usage(value)
            counted = tuple(sums[region, owner] for owner in ("free", "reclaim", "clearing"))
            if (usage.free_blocks, usage.reclaim_blocks, usage.clearing_blocks) != counted:
                self._find(
                    f"region {region}: usage says {usage.free_blocks} free, "
                    f"{usage.reclaim_blocks} to reclaim and {usage.clearing_blocks} to clear, "
                    f"there are {counted[0]}, {counted[1]} and {counted[2]}"
                )
            if usage.high_water_blocks < high_water[region]:
                self._find(
                    f"region {region}: block {high_water[region] - 1} is above the high water mark "
                    f"{usage.high_water_blocks}"
                )

    def _owned(self) -> Iterator[tuple[int, int, int, str]]:
        """Every (region, block, block count, whose) there is."""
        txn = self._txn
        for key, value in txn.scan(schema.FREE):
            yield *schema.unpack_region_block(key), schema.unpack_u64(value), "free"
        for table, owner in ((schema.GRANTS, "granted"), (schema.RECLAIM, "reclaim")):
            for key, value in txn.scan(table):
                _, region, block = schema.unpack_owner_region_block(key)
                yield region, block, schema.decode_granted(value).block_count, owner
        for _, value in txn.scan(schema.HEADER_LOG):
            change = schema.decode_header_change(value)
            if not change.ino:
                yield change.region, change.block, change.block_count, "clearing"
        for key, value in txn.scan(schema.REGIONS):
            for block in schema.decode_region(value).failed:
                yield schema.unpack_region(key), block, 1, "failed"
        for _, value in txn.scan(schema.EXTENTS):
            extent = schema.decode_extent(value)
            for place in extent.replicas:
                yield place.region, place.block, extent.block_count, "owned"

    def _claim(
        self,
        window: BlockWindow,
        usable: dict[int, int],
        region: int,
        block: int,
        count: int,
        owner: str,
    ) -> None:
        where = f"region {region}, blocks {block} to {block + count - 1} ({owner})"
        if block < 0 or count < 1 or block + count > usable.get(region, 0):
            if window.first:
                self._find(f"{where}: not within the region's usable blocks")
        elif not window.claim(region, block, count):
            self._find(f"{where}: somebody else has some of them too")


def _ino_of(row: tuple[bytes, bytes]) -> bytes:
    return row[0][:_INO_BYTES]


def _may_hold(parent: NodeKind, kind: NodeKind) -> bool:
    if parent is NodeKind.DIRECTORY:
        return kind is not NodeKind.KEYVALUE
    return kind is (NodeKind.FILE if parent is NodeKind.MULTIFILE else NodeKind.KEYVALUE)
