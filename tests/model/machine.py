"""A random program against a mount and a local file system at once (Hypothesis, stateful)."""

from __future__ import annotations

import itertools
import os
import shutil
import stat
from typing import Any, ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from tests.model.actions import Tree, acting_as, outcome

NAMES = ("a", "b", "c", "n" * 127 + "é" * 64)
ONE_NAME = st.sampled_from(NAMES)
PATHS = st.tuples(
    st.sampled_from(("existing", "existing", "existing", "child", "child", "random")),
    st.integers(0, 1 << 16),
    st.lists(ONE_NAME, min_size=1, max_size=3),
)
"""A path as a choice that is resolved against what exists: see ``FileSystemModel.resolve``."""
Choice = tuple[str, int, list[str]]
USERS = st.sampled_from((0, 0, 0, 1234, 1235))
MODES = st.sampled_from((0o000, 0o400, 0o644, 0o600, 0o755, 0o777, 0o1777, 0o2755, 0o4755, 0o6777))
BLOCK = 64 << 10
OFFSETS = st.one_of(
    st.sampled_from((0, 1, 4095, 4096, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 1 << 20)),
    st.integers(0, 300_000),
)
DATA = st.tuples(
    st.sampled_from((1, 7, 100, 4096, BLOCK - 1, BLOCK, BLOCK + 1, 200_000)), st.integers(1, 255)
).map(lambda pair: bytes([pair[1]]) * pair[0])
SLOTS = st.integers(0, 2)
XATTRS = st.sampled_from(("user.one", "user.two"))
OPEN_FLAGS = st.builds(
    lambda access, *flags: access | sum(flags),
    st.sampled_from((os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_RDWR)),
    st.sampled_from((0, os.O_CREAT)),
    st.sampled_from((0, 0, os.O_EXCL)),
    st.sampled_from((0, 0, os.O_TRUNC)),
    st.sampled_from((0, 0, os.O_APPEND)),
    st.sampled_from((0, 0, os.O_NOFOLLOW)),
)


class FileSystemModel(RuleBasedStateMachine):
    """Subclasses say where the two trees are; each example gets a directory of its own in both."""

    mount_roots: ClassVar[tuple[str, ...]]
    """One mount, or several of one file system: then the steps go round, and no file stays open
    over a step, because between mounts only close-to-open holds."""
    local_root: ClassVar[str]
    examples: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        type(self).examples += 1
        name = f"example-{type(self).examples}"
        mounts = [Tree(os.path.join(root, name)) for root in self.mount_roots]
        self.ours = mounts[0]
        self.mounts = itertools.cycle(mounts)
        self.keeps_files_open = len(mounts) == 1
        self.theirs = Tree(os.path.join(self.local_root, name))
        for tree in (self.ours, self.theirs):
            os.mkdir(tree.root, 0o777)
            os.chmod(tree.root, 0o777)
        self.paths: list[str] = []
        self.directories: list[str] = [""]

    @initialize()
    def populate(self) -> None:
        """Something to meet from the first step on."""
        self.both("mkdir", "a", 0o777)
        self.both("mkdir", "a/b", 0o755)
        self.both("write_file", "b", os.O_WRONLY | os.O_CREAT, 0, b"\x01" * 70_000)
        self.both("write_file", "a/c", os.O_WRONLY | os.O_CREAT, 0, b"\x02" * 100)
        self.both("chmod", "b", 0o666)
        if self.keeps_files_open:
            self.both("open", 0, "b", os.O_RDWR)

    def resolve(self, choice: Choice) -> str:
        """An existing path, a name in an existing directory, or any path at all."""
        kind, pick, names = choice
        if kind == "existing" and self.paths:
            return self.paths[pick % len(self.paths)]
        if kind == "child":
            return os.path.join(self.directories[pick % len(self.directories)], names[0])
        return "/".join(names)

    def teardown(self) -> None:
        for tree in (self.ours, self.theirs):
            tree.close_all()
            shutil.rmtree(tree.root)

    def both(self, action: str, *arguments: Any, uid: int = 0) -> Any:
        """Do it in both trees and compare; the local file system says what is right."""
        arguments = tuple(
            self.resolve(argument) if isinstance(argument, tuple) else argument
            for argument in arguments
        )
        self.ours = next(self.mounts)
        with acting_as(uid):
            expected = outcome(lambda: getattr(self.theirs, action)(*arguments))
            actual = outcome(lambda: getattr(self.ours, action)(*arguments))
        assert actual == expected, (
            f"{action}{arguments!r} as {uid}: mount {brief(actual)}, local {brief(expected)}"
        )
        return actual

    @rule(path=PATHS, mode=MODES, uid=USERS)
    def mkdir(self, path: Choice, mode: int, uid: int) -> None:
        self.both("mkdir", path, mode, uid=uid)

    @rule(path=PATHS, uid=USERS)
    def rmdir(self, path: Choice, uid: int) -> None:
        self.both("rmdir", path, uid=uid)

    @rule(path=PATHS, uid=USERS)
    def unlink(self, path: Choice, uid: int) -> None:
        self.both("unlink", path, uid=uid)

    @rule(old=PATHS, new=PATHS, flags=st.sampled_from((0, 0, 0, 1, 2)), uid=USERS)
    def rename(self, old: Choice, new: Choice, flags: int, uid: int) -> None:
        self.both("rename", old, new, flags, uid=uid)

    @rule(old=PATHS, new=PATHS)
    def link(self, old: Choice, new: Choice) -> None:
        self.both("link", old, new)

    @rule(points_to=PATHS, path=PATHS, uid=USERS)
    def symlink(self, points_to: Choice, path: Choice, uid: int) -> None:
        self.both("symlink", points_to, path, uid=uid)

    @rule(path=PATHS)
    def readlink(self, path: Choice) -> None:
        self.both("readlink", path)

    @rule(path=PATHS, kind=st.sampled_from((stat.S_IFIFO, stat.S_IFREG, stat.S_IFSOCK)))
    def mknod(self, path: Choice, kind: int) -> None:
        self.both("mknod", path, kind | 0o644)

    @rule(path=PATHS, mode=MODES, uid=USERS)
    def chmod(self, path: Choice, mode: int, uid: int) -> None:
        self.both("chmod", path, mode, uid=uid)

    @rule(path=PATHS, owner=st.sampled_from((0, 1234, 1235)), uid=USERS)
    def chown(self, path: Choice, owner: int, uid: int) -> None:
        self.both("chown", path, owner, owner, uid=uid)

    @rule(path=PATHS, uid=USERS)
    def age(self, path: Choice, uid: int) -> None:
        self.both("age", path, uid=uid)

    @rule(path=PATHS, size=OFFSETS, uid=USERS)
    def truncate(self, path: Choice, size: int, uid: int) -> None:
        self.both("truncate", path, size, uid=uid)

    @rule(path=PATHS, flags=OPEN_FLAGS, offset=OFFSETS, data=DATA, uid=USERS)
    def write_file(self, path: Choice, flags: int, offset: int, data: bytes, uid: int) -> None:
        self.both("write_file", path, flags | os.O_NONBLOCK, offset, data, uid=uid)

    @rule(path=PATHS, uid=USERS)
    def read_file(self, path: Choice, uid: int) -> None:
        self.both("read_file", path, uid=uid)

    @rule(path=PATHS, uid=USERS)
    def listdir(self, path: Choice, uid: int) -> None:
        self.both("listdir", path, uid=uid)

    @rule(path=PATHS, uid=USERS)
    def stat(self, path: Choice, uid: int) -> None:
        self.both("stat", path, uid=uid)

    @rule(path=PATHS, mode=st.sampled_from((os.R_OK, os.W_OK, os.X_OK)), uid=USERS)
    def access(self, path: Choice, mode: int, uid: int) -> None:
        self.both("access", path, mode, uid=uid)

    @rule(path=PATHS, name=XATTRS, value=st.binary(max_size=60), flags=st.sampled_from((0, 1, 2)))
    def setxattr(self, path: Choice, name: str, value: bytes, flags: int) -> None:
        self.both("setxattr", path, name, value, flags)

    @rule(path=PATHS, name=XATTRS)
    def getxattr(self, path: Choice, name: str) -> None:
        self.both("getxattr", path, name)

    @rule(path=PATHS, name=XATTRS)
    def removexattr(self, path: Choice, name: str) -> None:
        self.both("removexattr", path, name)

    @precondition(lambda self: self.keeps_files_open)
    @rule(slot=SLOTS, path=PATHS, flags=OPEN_FLAGS, uid=USERS)
    def open(self, slot: int, path: Choice, flags: int, uid: int) -> None:
        self.both("open", slot, path, flags, uid=uid)

    def has_open_file(self) -> bool:
        return bool(self.theirs.files)

    def slot(self, wanted: int) -> int:
        return sorted(self.theirs.files)[wanted % len(self.theirs.files)]

    @precondition(has_open_file)
    @rule(slot=SLOTS)
    def close(self, slot: int) -> None:
        self.both("close", self.slot(slot))

    @precondition(has_open_file)
    @rule(slot=SLOTS, offset=OFFSETS, data=DATA)
    def pwrite(self, slot: int, offset: int, data: bytes) -> None:
        self.both("pwrite", self.slot(slot), offset, data)

    @precondition(has_open_file)
    @rule(slot=SLOTS, offset=OFFSETS, byte_count=st.integers(0, 200_000))
    def pread(self, slot: int, offset: int, byte_count: int) -> None:
        self.both("pread", self.slot(slot), offset, byte_count)

    @precondition(has_open_file)
    @rule(slot=SLOTS, size=OFFSETS)
    def ftruncate(self, slot: int, size: int) -> None:
        self.both("ftruncate", self.slot(slot), size)

    @precondition(has_open_file)
    @rule(slot=SLOTS)
    def fstat(self, slot: int) -> None:
        self.both("fstat", self.slot(slot))

    @precondition(has_open_file)
    @rule(slot=SLOTS)
    def fsync(self, slot: int) -> None:
        self.both("fsync", self.slot(slot))

    @precondition(has_open_file)
    @rule(slot=SLOTS, offset=OFFSETS, data=DATA)
    def map_and_store(self, slot: int, offset: int, data: bytes) -> None:
        self.both("map_and_store", self.slot(slot), offset, data)

    @invariant()
    def same_tree(self) -> None:
        ours, theirs = self.ours.snapshot(), self.theirs.snapshot()
        assert list(ours) == list(theirs), "the trees have other names"
        self.paths = list(theirs)
        self.directories = ["", *(path for path in theirs if theirs[path][0][0].startswith("0o4"))]
        for path, expected in theirs.items():
            assert ours[path] == expected, (
                f"{path}: mount {brief(ours[path])}, local {brief(expected)}"
            )


def brief(value: Any) -> str:
    """``repr`` without the bulk of file contents."""
    text = repr(value)
    return text if len(text) < 400 else f"{text[:200]} … {text[-150:]} ({len(text)} characters)"
