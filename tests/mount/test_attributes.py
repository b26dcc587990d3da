"""Modes, owners, times, set-id bits, extended attributes, statfs."""

from __future__ import annotations

import errno
import os
import stat
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.mounts import in_child
from tests.support.syscalls import UTIME_NOW, UTIME_OMIT, utimensat

USER = 1234
ACL = b"\2\0\0\0" + b"".join(
    struct.pack("<HHI", tag, 6, 0xFFFFFFFF) for tag in (1, 4, 0x20)
)  # rw-rw-rw-
SECOND_NS = 1_000_000_000


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def errno_of(call: Callable[[], object]) -> int | None:
    with pytest.raises(OSError) as caught:
        call()
    return caught.value.errno


def test_chmod_takes_every_bit(place: Path) -> None:
    path = place / "file"
    path.touch()
    for mode in (0o000, 0o777, 0o4711, 0o2070, 0o1644, 0o7777):
        path.chmod(mode)
        assert mode_of(path) == mode
        with path.open("rb") as file:
            os.fchmod(file.fileno(), 0o600)
        assert mode_of(path) == 0o600


def test_chown_and_lchown(place: Path) -> None:
    path, link = place / "file", place / "link"
    path.touch()
    link.symlink_to("file")
    os.chown(path, 1, 2)
    os.lchown(link, 3, 4)
    os.chown(path, -1, 5)
    assert (path.stat().st_uid, path.stat().st_gid) == (1, 5)
    assert (link.lstat().st_uid, link.lstat().st_gid) == (3, 4)
    os.chown(path, 4_000_000_000, 4_000_000_001)
    assert (path.stat().st_uid, path.stat().st_gid) == (4_000_000_000, 4_000_000_001)


@pytest.mark.parametrize(
    "time_ns",
    [
        0,
        1,
        1_700_000_000_123_456_789,
        -1,
        -12_345_678_901_234_567,  # 1969
        -2_000_000_000 * SECOND_NS + 5,  # 1906
        4_102_444_800_987_654_321,  # 2100: more than 32 bits of seconds
    ],
)
def test_times_to_the_nanosecond_before_1970_and_after_2038(place: Path, time_ns: int) -> None:
    path = place / "file"
    path.touch()
    os.utime(path, ns=(time_ns, time_ns + 7))
    found = path.stat()
    assert (found.st_atime_ns, found.st_mtime_ns) == (time_ns, time_ns + 7)


def test_utime_now_and_omit(place: Path) -> None:
    path = place / "file"
    path.touch()
    os.utime(path, ns=(5, 6))
    before = time.time_ns()
    utimensat(path, (0, UTIME_OMIT), (0, UTIME_NOW))
    assert path.stat().st_atime_ns == 5
    assert before - SECOND_NS <= path.stat().st_mtime_ns <= time.time_ns()
    utimensat(path, (77, 8), (0, UTIME_OMIT))
    assert path.stat().st_atime_ns == 77 * SECOND_NS + 8
    assert path.stat().st_mtime_ns >= before - SECOND_NS


def test_times_of_a_symlink_are_its_own(place: Path) -> None:
    path, link = place / "file", place / "link"
    path.touch()
    link.symlink_to("file")
    os.utime(link, ns=(1, 2), follow_symlinks=False)
    assert link.lstat().st_mtime_ns == 2
    assert path.stat().st_mtime_ns > 2


def test_what_changes_the_change_time(place: Path) -> None:
    path = place / "file"
    path.write_bytes(b"x")
    last = path.stat().st_ctime_ns

    def write() -> None:
        path.write_bytes(b"y" * 9)

    changes: tuple[Callable[[], object], ...] = (
        write,
        lambda: path.chmod(0o600),
        lambda: os.chown(path, 1, 1),
        lambda: os.utime(path, ns=(1, 1)),
        lambda: os.link(path, place / "link"),
        lambda: os.setxattr(path, "user.x", b"1"),
        lambda: os.truncate(path, 3),
        (place / "link").unlink,
    )
    for change in changes:
        change()
        now = path.stat().st_ctime_ns
        assert now > last, change
        last = now


def test_reading_changes_no_modification_time_and_writing_does(place: Path) -> None:
    path = place / "file"
    path.write_bytes(b"content")
    os.utime(path, ns=(1, 1))
    path.read_bytes()
    assert path.stat().st_mtime_ns == 1
    with path.open("ab") as file:
        file.write(b"more")
    assert path.stat().st_mtime_ns > 1


def test_a_write_by_a_user_clears_set_id(place: Path) -> None:
    path = place / "file"
    for change in ("write", "truncate", "open"):
        path.write_bytes(b"x" * 100)
        os.chown(path, USER, USER)
        path.chmod(0o6777)

        def clear(change: str = change) -> None:
            if change == "write":
                fd = os.open(path, os.O_WRONLY)
                os.write(fd, b"y")
                os.close(fd)
            elif change == "truncate":
                os.truncate(path, 10)
            else:
                os.close(os.open(path, os.O_WRONLY | os.O_TRUNC))

        in_child(clear, uid=USER, gid=USER)
        assert mode_of(path) == 0o777, change


def test_a_write_by_root_keeps_set_id(place: Path) -> None:
    path = place / "file"
    path.write_bytes(b"x")
    path.chmod(0o6777)
    with path.open("r+b") as file:
        file.write(b"y")
    assert mode_of(path) == 0o6777


def test_a_change_of_owner_clears_set_id(place: Path) -> None:
    path = place / "file"
    path.touch()
    for uid, gid in ((USER, -1), (-1, USER), (-1, -1)):
        path.chmod(0o6755)
        os.chown(path, uid, gid)
        assert mode_of(path) == 0o755, (uid, gid)
    path.chmod(0o2644)  # no group execution: not a privilege
    os.chown(path, 0, 0)
    assert mode_of(path) & stat.S_ISUID == 0
    directory = place / "directory"
    directory.mkdir()
    directory.chmod(0o6755)
    os.chown(directory, USER, USER)
    assert mode_of(directory) == 0o6755


def test_a_set_group_id_directory_passes_its_group_on(place: Path) -> None:
    parent = place / "parent"
    parent.mkdir()
    os.chown(parent, 0, 555)
    parent.chmod(0o2777)

    def create() -> None:
        (parent / "file").touch()
        (parent / "directory").mkdir()

    in_child(create, uid=USER, gid=USER)
    assert (parent / "file").stat().st_gid == 555
    assert (parent / "directory").stat().st_gid == 555
    assert mode_of(parent / "directory") & stat.S_ISGID
    assert not mode_of(parent / "file") & stat.S_ISGID


def test_extended_attributes(place: Path) -> None:
    path = place / "file"
    path.touch()
    os.setxattr(path, "user.one", b"1")
    os.setxattr(path, "user.empty", b"")
    os.setxattr(path, "user.one", b"replaced", os.XATTR_REPLACE)
    big = bytes(range(256)) * 128
    os.setxattr(path, "user.big", big)
    assert os.getxattr(path, "user.one") == b"replaced"
    assert os.getxattr(path, "user.empty") == b""
    assert os.getxattr(path, "user.big") == big
    assert {"user.one", "user.empty", "user.big"} <= set(os.listxattr(path))
    for call, number in (
        (lambda: os.getxattr(path, "user.none"), errno.ENODATA),
        (lambda: os.removexattr(path, "user.none"), errno.ENODATA),
        (lambda: os.setxattr(path, "user.one", b"", os.XATTR_CREATE), errno.EEXIST),
        (lambda: os.setxattr(path, "user.none", b"", os.XATTR_REPLACE), errno.ENODATA),
        (lambda: os.setxattr(path, "user.large", bytes(65537)), errno.E2BIG),
        (lambda: os.setxattr(path, "user." + "n" * 251, b""), errno.ERANGE),
        (lambda: os.setxattr(path, "security.other", b"x"), errno.EOPNOTSUPP),
        (lambda: os.setxattr(path, "system.posix_acl_access", ACL), errno.EOPNOTSUPP),
        (lambda: os.getxattr(path, "system.posix_acl_access"), errno.EOPNOTSUPP),
    ):
        assert errno_of(call) == number
    os.removexattr(path, "user.one")
    assert "user.one" not in os.listxattr(path)
    os.setxattr(place, "user.directory", b"too")
    assert os.getxattr(place, "user.directory") == b"too"


def test_statfs_counts_what_files_take(place: Path) -> None:
    before = os.statvfs(place)
    assert before.f_namemax == 255
    assert 0 < before.f_bavail <= before.f_bfree <= before.f_blocks
    (place / "file").write_bytes(b"x" * (before.f_bsize * 20))
    used = os.statvfs(place)
    assert used.f_bfree <= before.f_bfree - 20
    assert used.f_blocks == before.f_blocks


def test_space_of_a_deleted_file_is_free_at_once(place: Path) -> None:
    path = place / "file"
    block = os.statvfs(place).f_bsize
    path.write_bytes(b"x" * (block * 50))
    full = os.statvfs(place).f_bfree
    path.unlink()
    assert os.statvfs(place).f_bfree >= full + 50
