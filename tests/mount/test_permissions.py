"""Who may do what: checks by owner, group, supplementary group and others; sticky directories."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.support.mounts import in_child

OWNER, MEMBER, STRANGER = 1234, 1235, 1236
GROUP = 4321


def attempt(
    call: Callable[[], object], uid: int, *, gid: int = 9999, groups: Sequence[int] = ()
) -> int:
    """The errno that user ``uid`` gets; 0 for success."""

    def run() -> int:
        try:
            call()
        except OSError as error:
            return error.errno or -1
        return 0

    return in_child(run, uid=uid, gid=gid, groups=groups)


def test_reading_and_writing_follow_the_three_classes(place: Path) -> None:
    path = place / "file"
    path.write_bytes(b"x")
    os.chown(path, OWNER, GROUP)
    read, write = path.read_bytes, lambda: os.close(os.open(path, os.O_WRONLY))
    for mode, expected in (
        (0o600, {OWNER: (0, 0), MEMBER: (13, 13), STRANGER: (13, 13)}),
        (0o640, {OWNER: (0, 0), MEMBER: (0, 13), STRANGER: (13, 13)}),
        (0o646, {OWNER: (0, 0), MEMBER: (0, 13), STRANGER: (0, 0)}),
        (0o077, {OWNER: (13, 13), MEMBER: (0, 0), STRANGER: (0, 0)}),
    ):
        path.chmod(mode)
        for uid, (reading, writing) in expected.items():
            groups = [GROUP] if uid == MEMBER else []  # supplementary only
            assert attempt(read, uid, groups=groups) == reading, (oct(mode), uid)
            assert attempt(write, uid, groups=groups) == writing, (oct(mode), uid)


def test_a_directory_without_execution_hides_what_is_below(place: Path) -> None:
    directory = place / "directory"
    directory.mkdir()
    (directory / "file").write_bytes(b"x")
    (directory / "file").chmod(0o666)
    directory.chmod(0o744)
    assert attempt((directory / "file").read_bytes, STRANGER) == errno.EACCES
    assert attempt(lambda: os.listdir(directory), STRANGER) == 0
    directory.chmod(0o711)
    assert attempt((directory / "file").read_bytes, STRANGER) == 0
    assert attempt(lambda: os.listdir(directory), STRANGER) == errno.EACCES


def test_changing_a_directory_needs_writing_it(place: Path) -> None:
    directory = place / "directory"
    directory.mkdir(0o755)
    (directory / "file").touch()
    for call in (
        (directory / "new").touch,
        (directory / "new").mkdir,
        (directory / "file").unlink,
        lambda: os.rename(directory / "file", directory / "moved"),
        lambda: os.symlink("x", directory / "new"),
        lambda: os.mkfifo(directory / "new"),
    ):
        assert attempt(call, STRANGER) == errno.EACCES


def test_only_the_owner_changes_mode_and_times_and_only_root_the_owner(place: Path) -> None:
    path = place / "file"
    path.touch()
    path.chmod(0o666)
    os.chown(path, OWNER, GROUP)
    assert attempt(lambda: path.chmod(0o777), STRANGER) == errno.EPERM
    assert attempt(lambda: path.chmod(0o777), OWNER) == 0
    assert attempt(lambda: os.utime(path, ns=(1, 1)), STRANGER) == errno.EPERM
    assert attempt(lambda: os.utime(path), STRANGER) == 0  # to now: whoever may write
    assert attempt(lambda: os.chown(path, STRANGER, -1), OWNER) == errno.EPERM
    assert attempt(lambda: os.chown(path, -1, 777), OWNER, groups=[777]) == 0
    assert attempt(lambda: os.chown(path, -1, 778), OWNER, groups=[777]) == errno.EPERM


def test_chmod_by_somebody_outside_the_group_drops_set_group_id(place: Path) -> None:
    path = place / "file"
    path.touch()
    os.chown(path, OWNER, GROUP)
    assert attempt(lambda: path.chmod(0o2755), OWNER) == 0
    assert path.stat().st_mode & 0o7777 == 0o755
    assert attempt(lambda: path.chmod(0o2755), OWNER, groups=[GROUP]) == 0
    assert path.stat().st_mode & 0o7777 == 0o2755


def test_in_a_sticky_directory_only_owners_remove_and_rename(place: Path) -> None:
    directory = place / "directory"
    directory.mkdir()
    directory.chmod(0o1777)
    path = directory / "file"
    path.touch()
    path.chmod(0o666)
    os.chown(path, OWNER, GROUP)
    assert attempt(path.unlink, STRANGER) == errno.EPERM
    assert attempt(lambda: path.rename(directory / "moved"), STRANGER) == errno.EPERM
    assert attempt((directory / "own").touch, STRANGER) == 0
    assert attempt(lambda: (directory / "own").rename(path), STRANGER) == errno.EPERM
    assert attempt(lambda: path.rename(directory / "moved"), OWNER) == 0
    assert attempt((directory / "moved").unlink, OWNER) == 0


def test_new_files_belong_to_who_made_them(place: Path) -> None:
    assert attempt((place / "file").touch, OWNER, gid=GROUP) == 0
    assert attempt((place / "directory").mkdir, OWNER, gid=GROUP) == 0
    for name in ("file", "directory"):
        made = (place / name).stat()
        assert (made.st_uid, made.st_gid) == (OWNER, GROUP)


def test_access_asks_for_the_real_user(place: Path) -> None:
    path = place / "file"
    path.touch()
    os.chown(path, OWNER, GROUP)
    path.chmod(0o500)

    def ask() -> tuple[bool, bool, bool]:
        return os.access(path, os.R_OK), os.access(path, os.W_OK), os.access(path, os.X_OK)

    assert in_child(ask, uid=OWNER, gid=GROUP) == (True, False, True)
    assert in_child(ask, uid=STRANGER, gid=GROUP) == (False, False, False)


def test_programs_run_from_the_mount(place: Path) -> None:
    script = place / "script"
    script.write_text("#!/bin/sh\nexit 7\n")
    script.chmod(0o755)
    assert in_child(lambda: os.waitstatus_to_exitcode(os.system(str(script)))) == 7
