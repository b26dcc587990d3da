"""A salvage's operations: what they refuse, what repeating them does, and what they leave."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from crailfs.errors import (
    ConflictError,
    CrailError,
    InvalidError,
    NotEmptyError,
    NotFoundError,
    NotPermittedError,
)
from crailfs.records import Extent, Location
from crailfs.units import ROOT_INODE
from crailfs.wire.messages import BeginSalvage, EndSalvage, Lookup, Opcode, Role, SalvageFile
from metadata_server.driver import Driver
from tests.metadata.handling import Server
from tests.metadata.headers import Headered
from tests.metadata.name_space import BLOCK_SIZE_BYTES, config

BEGIN = BeginSalvage(100, 50)
CHECKSUMS = bytes(8)


def extent(region: int, block: int, file_block: int = 0, **more: object) -> Extent:
    whole = Extent(
        file_block, 1, BLOCK_SIZE_BYTES, BLOCK_SIZE_BYTES, (Location(region, block, 9),), CHECKSUMS
    )
    changed: Extent = replace(whole, **more)
    return changed


class Salvaged(Headered):
    """Both regions hold a block of a lost name space."""

    def __init__(self, state: Path) -> None:
        super().__init__(state)
        for _ in range(2):
            ino = self.create(b"file").ino
            self.put(ino, 1)
            self.rename(ROOT_INODE, b"file", ROOT_INODE, b"f%d" % ino)
        self.follow()
        self.driver.close()
        shutil.rmtree(state)
        self.driver = Driver.open(config(state), clock_ns=self.clock)
        self.register()
        self.open_session()
        self.region, self.other_region = self.by_region

    def begin(self) -> None:
        self.do(Opcode.BEGIN_SALVAGE, BEGIN)

    def salvage(self, ino: int, size: int, *extents: Extent) -> None:
        self.do(Opcode.SALVAGE_FILE, SalvageFile(ino, size, extents))

    def end(self) -> None:
        self.do(Opcode.END_SALVAGE, EndSalvage(tuple(self.by_region)))


@pytest.fixture
def lost(tmp_path: Path) -> Iterator[Salvaged]:
    space = Salvaged(tmp_path / "state")
    yield space
    space.assert_sound()
    space.driver.close()


def test_numbers_go_on_above_those_of_the_lost_one(lost: Salvaged) -> None:
    lost.begin()
    lost.begin()
    assert lost.names() == [b"lost+found"]
    assert lost.lookup(ROOT_INODE, b"lost+found").mode == 0o700
    assert lost.create(b"new").ino == 101


def test_files_can_be_named_in_parts_and_again(lost: Salvaged) -> None:
    lost.begin()
    parts = [extent(lost.region, 5), extent(lost.region, 6, 1), extent(lost.other_region, 3, 9)]
    for _ in range(2):
        for part in parts:
            lost.salvage(40, 10 * BLOCK_SIZE_BYTES, part)
    lost.salvage(40, 10 * BLOCK_SIZE_BYTES, *parts)
    node = lost.attributes(40)
    assert (node.size, node.block_count, node.nlink) == (10 * BLOCK_SIZE_BYTES, 3, 1)
    folder = lost.lookup(ROOT_INODE, b"lost+found")
    assert lost.names(folder.ino) == [b"inode-40"] and folder.size == 1
    lost.end()
    lost.end()
    lost.follow()
    assert len(lost.headers()) == 0, "in this test no header says what was salvaged"
    assert lost.free_blocks == 2 * 64 - 3


def test_a_used_name_space_is_refused(lost: Salvaged) -> None:
    lost.create(b"something")
    with pytest.raises(NotEmptyError):
        lost.begin()


def test_nothing_before_the_beginning(lost: Salvaged) -> None:
    with pytest.raises(NotPermittedError):
        lost.salvage(40, 10, extent(lost.region, 5))


@pytest.mark.parametrize(
    ("error", "ino", "size", "broken"),
    [
        (InvalidError, 1, 4096, {}),
        (InvalidError, 101, 4096, {}),
        (ConflictError, 100, 4096, {}),
        (InvalidError, 40, 4095, {}),
        (InvalidError, 40, 4096, {"checksums": b""}),
        (InvalidError, 40, 4096, {"tail_visible_bytes": 0}),
        (InvalidError, 40, 4096, {"tail_stored_bytes": 5000}),
        (InvalidError, 40, 4096, {"replicas": (Location(77, 5, 9),)}),
        (InvalidError, 40, 4096, {"replicas": (Location(1, 5, 50),)}),
        (InvalidError, 40, 4096, {"replicas": (Location(1, 5, 0),)}),
        (CrailError, 40, 4096, {"replicas": (Location(1, 64, 9),)}),
        (CrailError, 40, 4096, {"replicas": (Location(1, 1 << 60, 9),)}),
        (InvalidError, 40, 4096, {"replicas": ()}),
        (ConflictError, 40, 4096, {"replicas": (Location(1, 7, 9),)}),
        (ConflictError, 30, 4096, {}),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(
    lost: Salvaged, error: type[CrailError], ino: int, size: int, broken: dict[str, object]
) -> None:
    lost.begin()
    lost.salvage(30, 4096, extent(lost.region, 7))
    with pytest.raises(error):
        lost.salvage(ino, size, extent(lost.region, 8, **broken))
    lost.assert_sound()
    assert lost.driver.audit().counts["owned_blocks"] == 1


def test_released_regions_take_no_more_files(lost: Salvaged) -> None:
    lost.begin()
    lost.end()
    with pytest.raises(InvalidError, match="is not one that holds"):
        lost.salvage(40, 4096, extent(lost.region, 5))
    with pytest.raises(InvalidError, match="no region 99"):
        lost.do(Opcode.END_SALVAGE, EndSalvage((99,)))
    with pytest.raises(InvalidError):
        lost.do(Opcode.END_SALVAGE, EndSalvage((1 << 32,)))


def test_only_operators_salvage(server: Server) -> None:
    for role in (Role.CLIENT, Role.STORAGE_SERVER):
        peer = server.connect(5 + role, role=role)
        for opcode, request in (
            (Opcode.BEGIN_SALVAGE, BEGIN),
            (Opcode.SALVAGE_FILE, SalvageFile(40, 0, ())),
            (Opcode.END_SALVAGE, EndSalvage(())),
        ):
            with pytest.raises(NotPermittedError):
                server.ask(peer, opcode, request)


def test_clients_that_look_are_told(server: Server) -> None:
    reader = server.connect(7)
    operator = server.connect(8, role=Role.OPERATOR)
    with pytest.raises(NotFoundError):
        server.ask(reader, Opcode.LOOKUP, Lookup(ROOT_INODE, b"lost+found"))
    server.ask(operator, Opcode.BEGIN_SALVAGE, BEGIN)
    assert any(entry.name == b"lost+found" for entry in server.answer(reader))
    server.ask(operator, Opcode.BEGIN_SALVAGE, BEGIN)
    with pytest.raises(NotPermittedError):
        server.create(operator, b"x")
