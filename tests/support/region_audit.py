"""What regions themselves know of their blocks, against their bytes and against the files."""

from __future__ import annotations

import struct
from contextlib import AsyncExitStack
from typing import NamedTuple

import trio
from msgspec.structs import replace
from xxhash import xxh3_64_intdigest

from crailfs.cli.operator import connected
from crailfs.cli.walk import walk
from crailfs.client.filesystem import FileSystem
from crailfs.config import ClientConfig, RegionConfig
from crailfs.limits import HEADER_PAGE_MAX
from crailfs.net.client import RpcClient
from crailfs.records import DATA_KINDS, Attributes, BlockHeader, Extent
from crailfs.units import blocks_for
from crailfs.wire.messages import (
    Audit,
    AuditReply,
    ExtentPage,
    GetExtents,
    HeaderPage,
    Opcode,
    ReadHeaders,
)
from storage_server.media import Medium, open_medium

DRAINED_TIMEOUT_S = 60


class OwnedBlock(NamedTuple):
    """One block of a file."""

    region: int
    header: BlockHeader


async def open_offline(
    config: RegionConfig, cluster_id: bytes, block_size_bytes: int
) -> Medium | None:
    """The region as its storage server would open it, while that one is not running; None if there
    is none yet."""
    if not config.path.exists():
        return None
    return await trio.to_thread.run_sync(
        lambda: open_medium(
            config, cluster_id=cluster_id, block_size_bytes=block_size_bytes, known_uuid=None
        )
    )


async def stored_headers(medium: Medium) -> list[BlockHeader]:
    """All of a region that keeps headers."""
    assert medium.headers is not None
    headers: list[BlockHeader] = []
    block = 0
    while block < medium.superblock.block_count:
        page, block = await trio.to_thread.run_sync(medium.headers.read, block, HEADER_PAGE_MAX)
        headers += page
    assert len(headers) == medium.headers.held_blocks
    return headers


async def check_headers(medium: Medium) -> int:
    """Each block that is some file's by the region's own headers has the bytes of its checksum.
    Returns how many there are."""
    headers = await stored_headers(medium)
    places = {(header.ino, header.file_block, header.generation) for header in headers}
    assert len(places) == len(headers), f"{medium.path}: two blocks for one place in a file"
    buffer = memoryview(bytearray(medium.superblock.block_size_bytes))
    for header in headers:
        stored = buffer[: header.stored_bytes]
        await medium.read(header.block * medium.superblock.block_size_bytes, stored)
        assert xxh3_64_intdigest(stored) == header.checksum, f"{medium.path}: {header}"
    return len(headers)


async def check_ownership(filesystem: FileSystem, config: ClientConfig) -> int:
    """With nobody writing: the metadata server finds its tables in order, no block is in two
    extents, and once the regions' headers have followed they say exactly what the extents do.
    Returns how many blocks of files lie in regions that keep headers."""
    async with AsyncExitStack() as stack:
        metadata = await stack.enter_async_context(connected(config.metadata, config))
        await filesystem.sync()
        with trio.fail_after(DRAINED_TIMEOUT_S):
            while True:
                reply = await _audit(metadata)
                assert reply.findings == (), reply.findings
                if not reply.counts.get("header_changes"):
                    break
                await trio.sleep(0.02)
        owned = await _owned_blocks(filesystem, metadata)
        places = [(block.region, block.header.block) for block in owned]
        assert len(set(places)) == len(places), "a block is in two extents"
        cluster = await filesystem.cluster_map()
        servers = {server.id: server for server in cluster.servers}
        compared = 0
        for region in cluster.regions:
            if not region.info.keeps_headers:
                continue
            server = servers[region.server_id]
            address = f"unix:{server.unix_path}"
            storage = await stack.enter_async_context(connected(address, config))
            headers = await _headers(storage, region.id, region.info.block_count)
            expected = {block.header for block in owned if block.region == region.id}
            assert headers == expected, (
                f"region {region.id}, only in headers: {headers - expected}, "
                f"only in extents: {expected - headers}"
            )
            compared += len(headers)
        return compared


async def owned_by(filesystem: FileSystem, config: ClientConfig, ino: int) -> list[OwnedBlock]:
    """The blocks of one file, as the metadata server has them."""
    async with connected(config.metadata, config) as metadata:
        return await _blocks_of_file(filesystem, metadata, await filesystem.attributes(ino))


async def _audit(metadata: RpcClient) -> AuditReply:
    reply = await metadata.call(Opcode.AUDIT, Audit(), deadline_ms=60_000)
    assert isinstance(reply, AuditReply)
    return reply


async def _headers(storage: RpcClient, region: int, block_count: int) -> set[BlockHeader]:
    found: set[BlockHeader] = set()
    block = 0
    while block < block_count:
        page = await storage.call(Opcode.READ_HEADERS, ReadHeaders(region, block, HEADER_PAGE_MAX))
        assert isinstance(page, HeaderPage)
        # Extents do not know the sequence under which a header says the same.
        found |= {replace(header, generation=0) for header in page.headers}
        block = page.next_block
    return found


async def _owned_blocks(filesystem: FileSystem, metadata: RpcClient) -> list[OwnedBlock]:
    owned = []
    async for _, attributes in walk(filesystem):
        if attributes.kind in DATA_KINDS:
            owned += await _blocks_of_file(filesystem, metadata, attributes)
    return owned


async def _blocks_of_file(
    filesystem: FileSystem, metadata: RpcClient, attributes: Attributes
) -> list[OwnedBlock]:
    owned = []
    block, end = 0, blocks_for(attributes.size, filesystem.block_size_bytes)
    while block < end:
        page = await metadata.call(
            Opcode.GET_EXTENTS, GetExtents(attributes.ino, block, end - block)
        )
        assert isinstance(page, ExtentPage)
        for extent in page.extents:
            owned += _blocks_of(attributes.ino, extent, filesystem.block_size_bytes)
        block = page.next_block
    return owned


def _blocks_of(ino: int, extent: Extent, block_size_bytes: int) -> list[OwnedBlock]:
    checksums = struct.unpack(f"<{extent.block_count}Q", extent.checksums)
    found = []
    for place in extent.replicas:
        for index, checksum in enumerate(checksums):
            is_last = index == extent.block_count - 1
            header = BlockHeader(
                place.block + index,
                ino,
                extent.file_block + index,
                0,
                extent.tail_stored_bytes if is_last else block_size_bytes,
                extent.tail_visible_bytes if is_last else block_size_bytes,
                checksum,
            )
            found.append(OwnedBlock(place.region, header))
    return found
