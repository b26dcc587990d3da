"""Finding mounts in what the kernel lists."""

from __future__ import annotations

from pathlib import Path

import pytest

from fuse_client import mountpoints

LISTED = rb"""
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
40 22 0:39 / /crail rw,nosuid,nodev - fuse.crailfs crailfs rw,user_id=0
41 22 0:40 / /with\040space\134and\011tab rw shared:7 master:2 - fuse.crailfs a\040name rw
42 22 0:41 / /other rw - fuse.sshfs host: rw
43 22 0:42 / /crail rw - fuse.crailfs crailfs rw
""".lstrip()


@pytest.fixture(autouse=True)
def mountinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mountinfo").write_bytes(LISTED)
    monkeypatch.setattr(mountpoints, "_MOUNTINFO", tmp_path / "mountinfo")


def test_only_ours_are_listed_with_their_paths_unescaped() -> None:
    found = [(mount.mountpoint, mount.device) for mount in mountpoints.list_mounts()]
    assert found == [
        (Path("/crail"), "0:39"),
        (Path("/with space\\and\ttab"), "0:40"),
        (Path("/crail"), "0:42"),
    ]


def test_the_uppermost_of_several_is_found() -> None:
    mount = mountpoints.find_mount(Path("/crail"))
    assert mount is not None
    assert mount.device == "0:42"
    assert mount.connection == Path("/sys/fs/fuse/connections/42")


def test_other_mounts_and_plain_directories_are_not_ours() -> None:
    for path in ("/other", "/", "/crail/below"):
        assert mountpoints.find_mount(Path(path)) is None
