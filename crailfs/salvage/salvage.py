"""A salvage from its beginning to its end, against a new metadata server and its storage servers.

Every step may be repeated: a salvage that was interrupted is run again from its beginning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

from crailfs.errors import ConflictError
from crailfs.net.client import RpcClient
from crailfs.records import Extent
from crailfs.salvage.files import FoundBlocks, FoundFile
from crailfs.salvage.regions import LostRegion
from crailfs.wire.messages import BeginSalvage, EndSalvage, Opcode, SalvageFile

EXTENTS_AT_ONCE: Final = 1_024
"""In one request: 128 blocks each, 1 KiB of checksums."""
_BLOCKS_NAMED_MAX: Final = 20


class Outcome(NamedTuple):
    findings: tuple[str, ...]
    """What could not be brought back whole, for people."""
    file_count: int
    block_count: int
    byte_count: int
    """Of the files' sizes, holes included."""
    superseded_count: int
    """Older blocks of the same files, left out."""
    is_complete: bool
    """False: something is in the way of some files, so the regions have not been released."""


async def salvage(
    metadata: RpcClient,
    regions: Sequence[LostRegion],
    block_size_bytes: int,
    *,
    verify: bool,
    on_progress: Callable[[str], None],
) -> Outcome:
    """Put every file of which the regions hold blocks into /lost+found, then give the rest of the
    regions free. ``on_progress`` is told what is being done, often.

    Raises ``NotEmptyError`` if the name space is not new, and what the servers answer else.
    """
    blocks = FoundBlocks(block_size_bytes)
    for region in regions:
        async for header in region.headers():
            blocks.add(region.id, header)
            if len(blocks) % 1024 == 0:
                on_progress(f"{len(blocks)} headers read")
    begin = BeginSalvage(blocks.next_ino, blocks.next_generation)
    await metadata.call(Opcode.BEGIN_SALVAGE, begin)

    findings = list(_header_findings(regions, blocks))
    by_id = {region.id: region for region in regions}
    file_count = block_count = byte_count = superseded_count = 0
    is_complete = True
    for file in blocks.files():
        try:
            await _put(metadata, file)
        except ConflictError as error:
            findings.append(f"inode {file.ino} is left where it is: {error.message}")
            is_complete = False
            continue
        if verify:
            damaged = [
                block
                for extent in file.extents
                for block in await by_id[extent.replicas[0].region].damaged_blocks(extent)
            ]
            if damaged:
                findings.append(_damage(file, damaged))
        file_count += 1
        block_count += file.block_count
        byte_count += file.size_bytes
        superseded_count += file.superseded_count
        on_progress(f"{file_count} files, {block_count} of {len(blocks)} blocks")
    if is_complete:
        await metadata.call(Opcode.END_SALVAGE, EndSalvage(tuple(by_id)))
    return Outcome(
        tuple(findings), file_count, block_count, byte_count, superseded_count, is_complete
    )


async def discard(metadata: RpcClient, regions: Sequence[int]) -> None:
    """Give up all that the regions hold: their blocks become free."""
    await metadata.call(Opcode.END_SALVAGE, EndSalvage(tuple(regions)))


async def _put(metadata: RpcClient, file: FoundFile) -> None:
    for extents in _parts(file.extents):
        await metadata.call(Opcode.SALVAGE_FILE, SalvageFile(file.ino, file.size_bytes, extents))


def _parts(extents: tuple[Extent, ...]) -> Iterator[tuple[Extent, ...]]:
    for first in range(0, len(extents), EXTENTS_AT_ONCE):
        yield extents[first : first + EXTENTS_AT_ONCE]


def _header_findings(regions: Sequence[LostRegion], blocks: FoundBlocks) -> Iterator[str]:
    for region in regions:
        for block in region.damaged_headers:
            yield f"region {region.id}, block {block}: its header is damaged, what it held is lost"
    if blocks.senseless_count:
        yield f"{blocks.senseless_count} headers say what cannot be: they are left out"


def _damage(file: FoundFile, damaged: Sequence[int]) -> str:
    shown = ", ".join(str(block) for block in damaged[:_BLOCKS_NAMED_MAX])
    more = (
        f" and {len(damaged) - _BLOCKS_NAMED_MAX} more" if len(damaged) > _BLOCKS_NAMED_MAX else ""
    )
    return (
        f"/lost+found/inode-{file.ino}: {len(damaged)} of {file.block_count} blocks are not what "
        f"was written and read as errors: file blocks {shown}{more}"
    )
