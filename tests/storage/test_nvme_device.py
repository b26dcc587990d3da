"""Whole block devices as regions: what is refused, what is recognized, what is discarded."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from crailfs.config import RegionConfig
from crailfs.errors import BusyError, ConfigurationError, DamagedError
from crailfs.records import HeaderChange, Tier
from crailfs.units import KIB, MIB
from storage_server.media import Medium, open_medium
from storage_server.media.superblock import copies_there
from tests.support.loop_device import loop_device

CLUSTER = b"c" * 16
BLOCK = 64 * KIB
SIZE = 32 * MIB


PARTITIONS = """
import sys
with open(sys.argv[1], "r+b") as device:
    device.seek(446)
    # One partition of 16 MiB from 1 MiB on, then the signature.
    device.write(bytes.fromhex("00000000 83000000 00080000 00800000") + bytes(48) + b"\\x55\\xaa")
"""


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Path]:
    with loop_device(tmp_path, SIZE) as device:
        yield device


def open_(
    device: Path,
    *,
    overwrite: bool = False,
    known: bytes | None = None,
    cluster: bytes = CLUSTER,
) -> Medium:
    config = RegionConfig(tier=Tier.NVME, path=device, size_bytes=1, overwrite=overwrite)
    return open_medium(config, cluster_id=cluster, block_size_bytes=BLOCK, known_uuid=known)


@contextlib.contextmanager
def opened(device: Path, **options: object) -> Iterator[Medium]:
    medium = open_(device, **options)  # type: ignore[arg-type]
    yield medium
    medium.close()


def content(device: Path) -> bytes:
    return device.read_bytes()


async def read(medium: Medium, block: int, byte_count: int) -> bytes:
    buffer = bytearray(byte_count)
    await medium.read(block * BLOCK, memoryview(buffer))
    return bytes(buffer)


async def test_takes_its_size_from_the_device_and_every_block_works(device: Path) -> None:
    with opened(device) as medium:
        count = medium.superblock.block_count
        assert SIZE - MIB <= count * BLOCK < SIZE - 64 * KIB
        assert medium.kind.startswith("block device with direct I/O") and medium.durable
        for block in (0, count // 2, count - 1):
            await medium.write(block * BLOCK, memoryview(b"%6d" % block * 10_000))
        for block in (0, count // 2, count - 1):
            assert await read(medium, block, 60_000) == b"%6d" % block * 10_000
        assert await medium.flush()


async def test_a_region_is_recognized_again_whatever_is_configured(device: Path) -> None:
    with opened(device) as first:
        await first.write(BLOCK, memoryview(b"kept"))
        assert first.headers is not None
        first.headers.apply([HeaderChange(1, 1, 1, 9, 0, 1, 4, 4, bytes(8))], 3)
    for known in (None, first.superblock.region_uuid):
        for overwrite in (False, True):
            with opened(device, known=known, overwrite=overwrite) as again:
                assert again.superblock == first.superblock
                assert await read(again, 1, 4) == b"kept"
                assert again.headers is not None and again.headers.held_blocks == 1


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (["mkfs.ext4", "-q"], "TYPE=ext4"),
        (["mkswap"], "TYPE=swap"),
        ([sys.executable, "-c", PARTITIONS], "PTTYPE=dos"),
    ],
)
def test_what_holds_something_is_refused_and_left_alone(
    device: Path, make: list[str], match: str
) -> None:
    try:
        subprocess.run([*make, str(device)], check=True, capture_output=True, timeout=30)
    except FileNotFoundError:
        pytest.skip(f"{make[0]} is not installed")
    before = content(device)
    with pytest.raises(BusyError, match=f"holds something .*{match}.*overwrite"):
        open_(device)
    assert content(device) == before
    with opened(device, overwrite=True):
        pass
    probed = subprocess.run(
        ["blkid", "--probe", str(device)], capture_output=True, text=True, check=False
    )
    assert probed.returncode == 2, f"the old signature is still there: {probed.stdout}"
    with opened(device):
        pass


def test_what_was_made_over_a_region_is_left_alone(device: Path) -> None:
    with opened(device) as medium:
        pass
    subprocess.run(["mkswap", str(device)], check=True, capture_output=True, timeout=30)
    assert copies_there_of(device) == [False, True]
    before = content(device)
    for known in (None, medium.superblock.region_uuid):
        with pytest.raises(BusyError, match=r"holds something .*TYPE=swap"):
            open_(device, known=known)
    assert content(device) == before


def test_a_first_copy_that_was_wiped_is_repaired(device: Path) -> None:
    with opened(device) as medium:
        pass
    with device.open("r+b") as file:
        file.write(bytes(512))
    with opened(device) as again:
        assert again.superblock == medium.superblock
    assert copies_there_of(device) == [True, True]


def copies_there_of(device: Path) -> list[bool]:
    with device.open("rb") as file:
        return copies_there(file.fileno())


def test_a_mounted_device_is_refused_even_to_overwrite(device: Path, tmp_path: Path) -> None:
    subprocess.run(["mkfs.ext4", "-q", str(device)], check=True, timeout=30)
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    mounted = subprocess.run(
        ["mount", str(device), str(mountpoint)], capture_output=True, check=False, timeout=30
    )
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount here: {mounted.stderr!r}")
    try:
        with pytest.raises(BusyError, match="in use: mounted"):
            open_(device, overwrite=True)
    finally:
        subprocess.run(["umount", str(mountpoint)], check=True, timeout=30)


def test_a_served_device_is_lent_to_nobody_else(device: Path) -> None:
    with opened(device) as medium:
        with pytest.raises(BusyError, match="in use"):
            open_(device)
        client_fd = os.dup(medium.shared_fd)
    with opened(device):
        pass
    os.close(client_fd)


def test_a_region_of_another_cluster_is_refused_until_it_is_cleared_as_told(device: Path) -> None:
    with opened(device, cluster=b"x" * 16) as other:
        pass
    before = content(device)
    for overwrite in (False, True):
        with pytest.raises(BusyError, match=r"belongs to cluster .* clear the device") as refused:
            open_(device, overwrite=overwrite)
    assert content(device) == before
    advice = refused.value.message.partition("clear the device: ")[2]
    subprocess.run(advice.split(), check=True, capture_output=True, timeout=30)
    with opened(device) as medium:
        assert medium.superblock.region_uuid != other.superblock.region_uuid


def test_a_known_region_that_is_gone_is_not_made_anew(device: Path) -> None:
    with opened(device) as medium:
        pass
    device.write_bytes(bytes(SIZE))
    for overwrite in (False, True):
        with pytest.raises(DamagedError, match="gone from its device"):
            open_(device, known=medium.superblock.region_uuid, overwrite=overwrite)


def test_both_copies_of_the_superblock_damaged_are_refused(device: Path) -> None:
    with opened(device) as medium:
        pass
    with device.open("r+b") as file:
        for offset in (20, 32 * KIB + 20):
            file.seek(offset)
            file.write(b"\xaa\x55")
    with pytest.raises(DamagedError, match="both copies"):
        open_(device, known=medium.superblock.region_uuid, overwrite=True)
    with opened(device, overwrite=True) as fresh:
        assert fresh.superblock.region_uuid != medium.superblock.region_uuid


def test_a_crash_in_the_middle_of_making_leaves_no_region(
    device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("storage_server.media.nvme_device.write_superblock", killed)
        with pytest.raises(KeyboardInterrupt):
            open_(device)
    with opened(device) as medium:
        assert medium.superblock.block_count > 400


def test_a_device_too_small_for_a_block_is_refused(tmp_path: Path) -> None:
    with (
        loop_device(tmp_path, 128 * KIB) as device,
        pytest.raises(ConfigurationError, match="holds no block"),
    ):
        open_(device)


def test_a_device_that_this_user_may_not_open_is_named(device: Path) -> None:
    config = RegionConfig(tier=Tier.NVME, path=device, size_bytes=1)
    pid = os.fork()
    if pid == 0:
        os.setgid(65534)
        os.setgroups([])
        os.setuid(65534)
        try:
            open_medium(config, cluster_id=CLUSTER, block_size_bytes=BLOCK, known_uuid=None)
        except ConfigurationError as error:
            os._exit(0 if "group disk" in error.message else 3)
        finally:
            os._exit(4)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


async def test_discarded_blocks_give_their_room_back(device: Path, tmp_path: Path) -> None:
    backing = tmp_path / "device"
    with opened(device) as medium:
        for block in range(100):
            await medium.write(block * BLOCK, memoryview(os.urandom(BLOCK)))
        await medium.flush()
        before = backing.stat().st_blocks * 512
        await medium.discard(10, 80)
        await medium.flush()
        freed = before - backing.stat().st_blocks * 512
        if not freed:
            pytest.skip("the file system under the loop device punches no holes")
        assert 80 * BLOCK - MIB <= freed <= 80 * BLOCK
        assert await read(medium, 9, 100) != bytes(100) != await read(medium, 90, 100)
        await medium.write(10 * BLOCK, memoryview(b"used again"))
        assert await read(medium, 10, 10) == b"used again"


def test_a_file_system_in_memory_is_refused_with_what_to_use() -> None:
    config = RegionConfig(tier=Tier.NVME, path=Path("/dev/shm/crail-region"), size_bytes=MIB)
    with pytest.raises(ConfigurationError, match="ext4 or xfs"):
        open_medium(config, cluster_id=CLUSTER, block_size_bytes=BLOCK, known_uuid=None)
    assert not config.path.exists()


def test_a_program_that_looks_at_the_device_is_needed(
    device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage_server.media.nvme_device.shutil.which", lambda *_, **__: None)
    with pytest.raises(ConfigurationError, match=r"blkid .* is missing"):
        open_(device)
    with opened(device, overwrite=True):
        pass
