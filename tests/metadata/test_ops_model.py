"""Random sequences of name space operations against a small model in memory, audited throughout.

The model is made of Python objects and follows the manual pages; it shares no code with the
operations. After each step outcome, listing and attributes agree and the audit finds nothing.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from crailfs.errors import CrailError
from crailfs.records import NodeKind
from crailfs.units import ROOT_INODE
from crailfs.wire.messages import RenameFlag
from metadata_server.driver import Driver
from tests.metadata.name_space import BLOCK_SIZE_BYTES, NameSpace, config

NAMES = [b"a", b"b", b"c"]
FLAT = {NodeKind.MULTIFILE: NodeKind.FILE, NodeKind.TABLE: NodeKind.KEYVALUE}
DATA = {NodeKind.FILE, NodeKind.KEYVALUE}
DIRECTORIES = {NodeKind.DIRECTORY, NodeKind.MULTIFILE, NodeKind.TABLE}


@dataclass(eq=False)
class Node:
    kind: NodeKind
    names: int = 0
    size: int = 0
    blocks: set[int] = field(default_factory=set)
    parent: Node | None = None
    entries: dict[bytes, Node] = field(default_factory=dict)
    ino: int = 0
    is_open: bool = False

    @property
    def is_directory(self) -> bool:
        return self.kind in DIRECTORIES

    @property
    def nlink(self) -> int:
        if not self.is_directory:
            return self.names
        return 2 + sum(n.is_directory for n in self.entries.values()) if self.names else 0

    def is_below(self, other: Node) -> bool:
        above: Node | None = self
        while above is not None:
            if above is other:
                return True
            above = above.parent
        return False


class RefusalError(Exception):
    """The class name of the error that the operation must end with."""


def check(condition: bool, *errors: str) -> None:
    if not condition:
        raise RefusalError(*errors)


def check_parent(parent: Node) -> None:
    check(parent.is_directory, "NotADirectoryCrailError")
    check(parent.names > 0, "NotFoundError")


def check_fits(node_kind: NodeKind, parent: Node) -> None:
    if parent.kind in FLAT:
        check(node_kind is FLAT[parent.kind], "NotPermittedError")
    check(parent.kind is NodeKind.TABLE or node_kind is not NodeKind.KEYVALUE, "NotPermittedError")


class NameSpaceModel(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.path = Path(tempfile.mkdtemp(prefix="crail-model-"))
        self.real = NameSpace(self.path / "state")
        self.real.add_storage(block_count=256)
        self.root = Node(NodeKind.DIRECTORY, names=1, ino=ROOT_INODE)
        self.live = [self.root]

    @initialize()
    def make_something_to_work_on(self) -> None:
        """Directories four deep, files with data beside them, one with two names."""
        for depth in range(1, 4):
            self.create(depth - 1, b"a", NodeKind.DIRECTORY)
        for name in (b"b", b"c"):
            for at in (0, 1, 3):
                self.create(at, name, NodeKind.FILE)
        for node in self.live:
            if node.kind is NodeKind.FILE:
                self.write_to(node, 0, 9000)
        self.rename(0, 2, b"b", b"b", RenameFlag.NONE)
        self.link(4, 0, b"b")

    def teardown(self) -> None:
        self.real.driver.close()
        shutil.rmtree(self.path)

    def pick(self, index: int) -> Node:
        return self.live[index % len(self.live)]

    def pick_file(self, index: int) -> Node:
        """Mostly one that has data."""
        files = [node for node in self.live if node.kind in DATA]
        return files[index % len(files)] if files and index % 5 else self.pick(index)

    def pick_entry(self, index: int, name: bytes) -> tuple[Node, bytes]:
        """Mostly a name that is there."""
        node = self.pick(index)
        for directory in (node, *self.live[index % len(self.live) :], *self.live):
            if directory.entries and index % 5:
                return directory, sorted(directory.entries)[index % len(directory.entries)]
        return node, name

    def expect(self, error: RefusalError | None, problem: CrailError | None) -> None:
        expected = error.args if error else (None,)
        found = type(problem).__name__ if problem else None
        assert found in expected, f"{problem!r} instead of {expected}"

    def attempt(self, model, real):  # type: ignore[no-untyped-def]
        """Both do it or both refuse, for the same reason. Returns what the real one answered."""
        refused = problem = answer = None
        try:
            model()
        except RefusalError as error:
            refused = error
        try:
            answer = real()
        except CrailError as error:
            problem = error
        self.expect(refused, problem)
        return answer

    def unname(self, node: Node) -> None:
        node.names -= 1
        if node.names == 0 and not node.is_open:
            self.live.remove(node)

    def known_closed(self, node: Node | None) -> int:
        return 0 if node is None or node.is_open else node.ino

    # --- operations -----------------------------------------------------------------------------

    @rule(
        at=st.integers(0, 99),
        name=st.sampled_from(NAMES),
        kind=st.sampled_from(
            [NodeKind.DIRECTORY, NodeKind.FILE, *FLAT, NodeKind.DIRECTORY, NodeKind.FIFO]
        ),
    )
    def create(self, at: int, name: bytes, kind: NodeKind) -> None:
        parent = self.pick(at)
        node = Node(kind, names=1, parent=parent if kind in DIRECTORIES else None)

        def model() -> None:
            check_parent(parent)
            check(name not in parent.entries, "ExistsError")
            if parent.kind is NodeKind.TABLE and kind is NodeKind.FILE:
                node.kind = NodeKind.KEYVALUE
            check_fits(node.kind, parent)
            parent.entries[name] = node
            self.live.append(node)

        made = self.attempt(model, lambda: self.real.create(name, parent.ino, kind))
        if made is not None:
            node.ino = made.ino

    @rule(at=st.integers(0, 99), name=st.sampled_from(NAMES), directory=st.booleans())
    def remove(self, at: int, name: bytes, directory: bool) -> None:
        parent, name = self.pick_entry(at, name)
        node = parent.entries.get(name)

        def model() -> None:
            check_parent(parent)
            check(node is not None, "NotFoundError")
            assert node is not None
            check(directory or not node.is_directory, "IsADirectoryCrailError")
            check(node.is_directory or not directory, "NotADirectoryCrailError")
            check(not node.entries, "NotEmptyError")
            del parent.entries[name]
            self.unname(node)

        closed = self.known_closed(node)
        reply = self.attempt(
            model,
            lambda: self.real.remove(name, parent.ino, directory=directory, not_open=closed),
        )
        if reply is not None and node is not None:
            assert (reply.ino, reply.nlink) == (node.ino, 0 if node.is_directory else node.names)
            assert reply.held == (node.is_open and node.names == 0)

    @rule(at=st.integers(0, 99), to=st.integers(0, 99), name=st.sampled_from(NAMES))
    def link(self, at: int, to: int, name: bytes) -> None:
        node, parent = self.pick(at), self.pick(to)

        def model() -> None:
            check_parent(parent)
            check(name not in parent.entries, "ExistsError")
            check(not node.is_directory, "NotPermittedError")
            check(node.names > 0, "NotFoundError")
            check_fits(node.kind, parent)
            parent.entries[name] = node
            node.names += 1

        self.attempt(model, lambda: self.real.link(node.ino, name, parent.ino))

    @rule(
        at=st.integers(0, 99),
        to=st.integers(0, 99),
        name=st.sampled_from(NAMES),
        new_name=st.sampled_from(NAMES),
        flag=st.sampled_from([RenameFlag.NONE, RenameFlag.NONE, *RenameFlag]),
    )
    def rename(self, at: int, to: int, name: bytes, new_name: bytes, flag: RenameFlag) -> None:
        parent, name = self.pick_entry(at, name)
        new_parent = self.pick(to)
        node, target = parent.entries.get(name), new_parent.entries.get(new_name)

        def model() -> None:
            check_parent(parent)
            check_parent(new_parent)
            check(node is not None, "NotFoundError")
            assert node is not None
            exchange = flag is RenameFlag.EXCHANGE
            check(target is not None or not exchange, "NotFoundError")
            check(target is None or flag is not RenameFlag.NO_REPLACE, "ExistsError")
            check(not (node.is_directory and new_parent.is_below(node)), "InvalidError")
            if target is node:
                return
            loops = exchange and target is not None and target.is_directory
            check(not (loops and parent.is_below(target)), "InvalidError", "NotPermittedError")
            check_fits(node.kind, new_parent)
            if exchange:
                assert target is not None
                check_fits(target.kind, parent)
                parent.entries[name], new_parent.entries[new_name] = target, node
                if target.is_directory:
                    target.parent = parent
            else:
                if target is not None:
                    both = target.is_directory or not node.is_directory
                    check(both, "NotADirectoryCrailError")
                    both = node.is_directory or not target.is_directory
                    check(both, "IsADirectoryCrailError")
                    check(not target.entries, "NotEmptyError")
                    self.unname(target)
                del parent.entries[name]
                new_parent.entries[new_name] = node
            if node.is_directory:
                node.parent = new_parent

        closed = self.known_closed(target)
        self.attempt(
            model,
            lambda: self.real.rename(parent.ino, name, new_parent.ino, new_name, flag, closed),
        )

    @rule(at=st.integers(0, 99), first_block=st.integers(0, 4), size=st.integers(1, 9000))
    def write(self, at: int, first_block: int, size: int) -> None:
        node = self.pick_file(at)
        if node.kind in DATA:
            self.write_to(node, first_block, size)

    def write_to(self, node: Node, first_block: int, size: int) -> None:
        self.real.write(node.ino, size, first_block)
        block_count = -(-size // BLOCK_SIZE_BYTES)
        node.blocks |= set(range(first_block, first_block + block_count))
        node.size = max(node.size, first_block * BLOCK_SIZE_BYTES + size)

    @rule(at=st.integers(0, 99), size=st.integers(0, 30_000))
    def truncate(self, at: int, size: int) -> None:
        node = self.pick_file(at)

        def model() -> None:
            check(not node.is_directory, "IsADirectoryCrailError")
            check(node.kind in DATA, "InvalidError")
            node.size = size
            node.blocks = {block for block in node.blocks if block * BLOCK_SIZE_BYTES < size}

        self.attempt(model, lambda: self.real.set(node.ino, size=size))

    @rule(at=st.integers(0, 99))
    def open(self, at: int) -> None:
        self.pick(at).is_open = True

    @rule(at=st.integers(0, 99))
    def close(self, at: int) -> None:
        node = self.pick(at)
        node.is_open = False
        if node.names == 0:
            self.live.remove(node)
        self.real.release(node.ino)

    @rule(clean=st.booleans(), checkpoint=st.booleans())
    def restart(self, clean: bool, checkpoint: bool) -> None:
        if checkpoint:
            self.real.driver.checkpoint()
        if clean:
            self.real.driver.close()
        else:
            self.real.driver._txn.abort()
            self.real.driver._state.close()
        self.real.driver = Driver.open(config(self.real.state), clock_ns=self.real.clock)

    # --- agreement ------------------------------------------------------------------------------

    @invariant()
    def all_nodes_agree(self) -> None:
        for node in self.live:
            real = self.real.attributes(node.ino)
            assert (real.kind, real.nlink) == (node.kind, node.nlink)
            assert real.block_count == len(node.blocks)
            assert real.size == (len(node.entries) if node.is_directory else node.size)
            if node.is_directory:
                page = self.real.page(node.ino)
                found = {entry.name: entry.attributes.ino for entry in page.entries}
                assert found == {name: child.ino for name, child in node.entries.items()}

    @invariant()
    def audit_finds_nothing(self) -> None:
        reply = self.real.driver.audit()
        assert reply.findings == ()
        nodes = sum(count for what, count in reply.counts.items() if what.endswith("_nodes"))
        assert nodes == len(self.live)
        owned = sum(len(node.blocks) for node in self.live)
        assert reply.counts.get("owned_blocks", 0) == owned


TestNameSpaceModel = NameSpaceModel.TestCase
TestNameSpaceModel.settings = settings(
    max_examples=50,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
