"""Names: directories, renames, links, special files, removal while open, long names."""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.mounts import in_child
from tests.support.syscalls import RENAME_EXCHANGE, RENAME_NOREPLACE, RENAME_WHITEOUT, renameat2


def errno_of(call: Callable[[], object]) -> int:
    with pytest.raises(OSError) as caught:
        call()
    assert caught.value.errno is not None
    return caught.value.errno


def test_directories_are_made_and_removed(place: Path) -> None:
    directory = place / "directory"
    directory.mkdir()
    assert place.stat().st_nlink == 3
    assert errno_of(directory.mkdir) == errno.EEXIST
    (directory / "file").touch()
    assert errno_of(directory.rmdir) == errno.ENOTEMPTY
    assert errno_of((directory / "file").rmdir) == errno.ENOTDIR
    assert errno_of(directory.unlink) == errno.EISDIR
    (directory / "file").unlink()
    directory.rmdir()
    assert not directory.exists()
    assert place.stat().st_nlink == 2
    assert errno_of(directory.rmdir) == errno.ENOENT
    assert errno_of((directory / "below").mkdir) == errno.ENOENT


def test_changing_a_directory_changes_its_times(place: Path) -> None:
    os.utime(place, ns=(1, 1))
    (place / "file").touch()
    assert place.stat().st_mtime_ns > 1
    os.utime(place, ns=(1, 1))
    (place / "file").rename(place / "other")
    assert place.stat().st_mtime_ns > 1
    os.utime(place, ns=(1, 1))
    (place / "other").unlink()
    assert place.stat().st_mtime_ns > 1


def test_rename_replaces_a_file_in_one_step(place: Path) -> None:
    (place / "new").write_bytes(b"new")
    (place / "old").write_bytes(b"old")
    with (place / "old").open("rb") as replaced:
        (place / "new").rename(place / "old")
        assert replaced.read() == b"old"
        assert os.fstat(replaced.fileno()).st_nlink == 0
    assert (place / "old").read_bytes() == b"new"
    assert not (place / "new").exists()


def test_rename_moves_directories_with_what_they_hold(place: Path) -> None:
    (place / "a" / "b").mkdir(parents=True)
    (place / "a" / "b" / "file").write_bytes(b"x")
    (place / "c").mkdir()
    (place / "a" / "b").rename(place / "c" / "d")
    assert (place / "c" / "d" / "file").read_bytes() == b"x"
    assert (place / "a").stat().st_nlink == 2
    assert (place / "c").stat().st_nlink == 3
    assert os.stat(place / "c" / "d" / "..").st_ino == (place / "c").stat().st_ino


def test_rename_refuses_what_posix_refuses(place: Path) -> None:
    (place / "directory" / "below").mkdir(parents=True)
    (place / "empty").mkdir()
    (place / "file").touch()
    for old, new, number in (
        ("directory", "directory/below/inside", errno.EINVAL),
        ("directory", "directory/below", errno.EINVAL),
        ("file", "empty", errno.EISDIR),
        ("directory", "file", errno.ENOTDIR),
        ("empty", "directory", errno.ENOTEMPTY),
        ("missing", "file", errno.ENOENT),
        ("file", "missing/file", errno.ENOENT),
    ):
        assert errno_of(lambda old=old, new=new: os.rename(place / old, place / new)) == number, old
    os.rename(place / "directory", place / "empty")
    assert (place / "empty" / "below").is_dir()


def test_rename_onto_itself_and_onto_another_link_does_nothing(place: Path) -> None:
    (place / "one").write_bytes(b"x")
    os.link(place / "one", place / "two")
    os.rename(place / "one", place / "one")
    os.rename(place / "one", place / "two")
    assert (place / "one").stat().st_nlink == 2


def test_rename_without_replacing(place: Path) -> None:
    (place / "one").write_bytes(b"1")
    (place / "two").write_bytes(b"2")
    number = errno_of(lambda: renameat2(place / "one", place / "two", RENAME_NOREPLACE))
    assert number == errno.EEXIST
    renameat2(place / "one", place / "three", RENAME_NOREPLACE)
    assert (place / "three").read_bytes() == b"1"


def test_exchange_of_a_file_and_a_directory(place: Path) -> None:
    (place / "a").mkdir()
    (place / "a" / "file").write_bytes(b"f")
    (place / "directory").mkdir()
    (place / "directory" / "inside").touch()
    renameat2(place / "a" / "file", place / "directory", RENAME_EXCHANGE)
    assert (place / "directory").read_bytes() == b"f"
    assert (place / "a" / "file" / "inside").exists()
    assert (place / "a").stat().st_nlink == 3
    number = errno_of(lambda: renameat2(place / "a", place / "none", RENAME_EXCHANGE))
    assert number == errno.ENOENT


def test_whiteout_is_refused(place: Path) -> None:
    (place / "one").touch()
    number = errno_of(lambda: renameat2(place / "one", place / "two", RENAME_WHITEOUT))
    assert number == errno.EINVAL


def test_hard_links_share_everything(place: Path) -> None:
    one, two = place / "one", place / "two"
    one.write_bytes(b"first")
    os.link(one, two)
    assert one.stat().st_ino == two.stat().st_ino
    assert one.stat().st_nlink == 2
    two.write_bytes(b"second")
    two.chmod(0o600)
    assert one.read_bytes() == b"second"
    assert stat.S_IMODE(one.stat().st_mode) == 0o600
    one.unlink()
    assert two.stat().st_nlink == 1
    assert errno_of(lambda: os.link(place, place / "directory")) == errno.EPERM
    assert errno_of(lambda: os.link(place / "missing", place / "x")) == errno.ENOENT
    (place / "x").touch()
    assert errno_of(lambda: os.link(two, place / "x")) == errno.EEXIST


def test_symlinks(place: Path) -> None:
    link = place / "link"
    link.symlink_to("target")
    assert os.readlink(link) == "target"
    assert link.lstat().st_size == len("target")
    assert stat.S_IMODE(link.lstat().st_mode) == 0o777
    assert errno_of(link.stat) == errno.ENOENT
    (place / "target").write_bytes(b"reached")
    assert link.read_bytes() == b"reached"
    longest = "x" * 4095
    (place / "long").symlink_to(longest)
    assert os.readlink(place / "long") == longest
    assert errno_of(lambda: (place / "too long").symlink_to("x" * 4096)) == errno.ENAMETOOLONG
    link.unlink()
    assert (place / "target").exists()


def test_a_fifo_carries_bytes_between_processes(place: Path) -> None:
    path = place / "fifo"
    os.mkfifo(path, 0o666)
    assert stat.S_ISFIFO(path.stat().st_mode)
    reading = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        in_child(lambda: path.write_bytes(b"through the pipe"))
        assert os.read(reading, 100) == b"through the pipe"
    finally:
        os.close(reading)


def test_a_socket_can_be_bound_and_reached(place: Path) -> None:
    # By a relative path: an address holds 107 bytes only.
    def serve_and_connect() -> bytes:
        os.chdir(place)
        with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
            server.bind("socket")
            server.listen()
            client.connect("socket")
            client.sendall(b"hello")
            return server.accept()[0].recv(10)

    assert in_child(serve_and_connect) == b"hello"
    assert stat.S_ISSOCK((place / "socket").stat().st_mode)


def test_device_nodes_keep_their_numbers(place: Path) -> None:
    for name, kind in (("character", stat.S_IFCHR), ("block", stat.S_IFBLK)):
        os.mknod(place / name, kind | 0o600, os.makedev(7, 130))
        made = (place / name).stat()
        assert stat.S_IFMT(made.st_mode) == kind
        assert (os.major(made.st_rdev), os.minor(made.st_rdev)) == (7, 130)
    os.mknod(place / "regular", stat.S_IFREG | 0o640)
    assert (place / "regular").stat().st_size == 0


def test_a_removed_file_lives_as_long_as_it_is_open(place: Path) -> None:
    path = place / "file"
    path.write_bytes(b"before")
    with path.open("r+b", buffering=0) as file:
        path.unlink()
        assert not path.exists()
        path.write_bytes(b"another file")
        assert file.read() == b"before"
        file.write(b" and after" * 20_000)
        file.seek(0)
        assert file.read() == b"before" + b" and after" * 20_000
        os.ftruncate(file.fileno(), 3)
        assert os.fstat(file.fileno()).st_size == 3
        assert os.fstat(file.fileno()).st_nlink == 0
    assert path.read_bytes() == b"another file"


def test_a_removed_directory_is_empty_for_those_inside(place: Path) -> None:
    def look_around() -> tuple[list[str], int]:
        directory = place / "directory"
        directory.mkdir()
        os.chdir(directory)
        directory.rmdir()
        return os.listdir("."), errno_of(lambda: os.mkdir("new"))

    assert in_child(look_around) == ([], errno.ENOENT)


def test_names_of_255_bytes_and_no_more(place: Path) -> None:
    longest = "ü" * 127 + "x"
    assert len(os.fsencode(longest)) == 255
    (place / longest).write_bytes(b"x")
    assert os.listdir(place) == [longest]
    (place / longest).rename(place / ("y" * 255))
    for call in (
        (place / ("z" * 256)).touch,
        (place / ("z" * 256)).stat,
        (place / ("z" * 256)).mkdir,
        lambda: (place / ("y" * 255)).rename(place / ("z" * 256)),
    ):
        assert errno_of(call) == errno.ENAMETOOLONG


def test_names_are_bytes(place: Path) -> None:
    name = os.fsencode(place) + b"/\xff\xfe \n\t*?\x01"
    with open(name, "wb") as file:
        file.write(b"x")
    assert os.listdir(os.fsencode(place)) == [b"\xff\xfe \n\t*?\x01"]
    os.unlink(name)


def test_paths_of_4095_bytes(place: Path) -> None:
    def make_and_read() -> tuple[bytes, int]:
        os.chdir(place)
        component = "d" * 199
        depth = 20  # of 200 bytes each, with the slash
        for _ in range(depth):
            os.mkdir(component)
            os.chdir(component)
        os.chdir(place)
        path = f"{component}/" * depth
        longest = path + "f" * (4095 - len(path))
        with open(longest, "wb") as file:
            file.write(b"deep")
        with open(longest, "rb") as file:
            return file.read(), errno_of(lambda: os.stat(longest + "f"))

    assert in_child(make_and_read) == (b"deep", errno.ENAMETOOLONG)


def test_the_umask_applies(place: Path) -> None:
    def create() -> None:
        os.umask(0o027)
        (place / "file").touch(0o666)
        (place / "directory").mkdir(0o777)
        os.mkfifo(place / "fifo", 0o666)

    in_child(create)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in place.iterdir()}
    assert modes == {"file": 0o640, "directory": 0o750, "fifo": 0o640}
