"""The lab has what it promises: the devices are there and of the kind that they should be."""

from __future__ import annotations

import mmap
import os
import socket
import stat
from pathlib import Path

MAP_SHARED_VALIDATE, MAP_SYNC = 0x03, 0x80000


def test_devdax_can_be_mapped_and_written(devdax: Path) -> None:
    descriptor = os.open(devdax, os.O_RDWR)
    try:
        with mmap.mmap(descriptor, 2 << 20) as memory:
            memory[:4] = b"here"
        with mmap.mmap(descriptor, 2 << 20) as memory:
            assert memory[:4] == b"here"
    finally:
        os.close(descriptor)


def test_a_file_on_fsdax_can_be_mapped_with_map_sync(fsdax: Path) -> None:
    path = fsdax / "probe"
    path.write_bytes(bytes(1 << 20))
    descriptor = os.open(path, os.O_RDWR)
    try:
        with mmap.mmap(descriptor, 1 << 20, flags=MAP_SHARED_VALIDATE | MAP_SYNC) as memory:
            memory[:4] = b"here"
    finally:
        os.close(descriptor)
    assert path.read_bytes()[:4] == b"here"


def test_the_nvme_disk_takes_direct_writes(nvme: Path) -> None:
    assert stat.S_ISBLK(nvme.stat().st_mode)
    descriptor = os.open(nvme, os.O_RDWR | os.O_DIRECT)
    try:
        with mmap.mmap(-1, 4096) as page:
            page[:] = b"x" * 4096
            assert os.pwrite(descriptor, page, 1 << 20) == 4096
            os.fsync(descriptor)
            page[:] = bytes(4096)
            assert os.preadv(descriptor, [page], 1 << 20) == 4096
            assert page[:] == b"x" * 4096
    finally:
        os.close(descriptor)


def test_the_rdma_device_is_active_and_has_this_hosts_address(
    rdma_device: str, address: str
) -> None:
    port = Path("/sys/class/infiniband") / rdma_device / "ports/1"
    assert "ACTIVE" in (port / "state").read_text()
    mapped = "0000:0000:0000:0000:0000:ffff:" + socket.inet_aton(address).hex(":", 2)
    assert mapped in {gid.read_text().strip() for gid in (port / "gids").iterdir()}


def test_fuse_is_there() -> None:
    os.close(os.open("/dev/fuse", os.O_RDWR))
