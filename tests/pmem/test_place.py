"""What lies under a region, and on which processors the server runs; against a made-up sysfs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from crailfs.errors import ConfigurationError
from storage_server.media.pmem_numa import run_near
from storage_server.media.pmem_place import Kind, Place, examine

GIGABYTE = 1 << 30


@pytest.fixture
def sysfs(tmp_path: Path) -> Path:
    return tmp_path / "sys"


def add_device(
    sysfs: Path, device: str, numbers: str, *, align: int = 2 << 20, numa_node: int | None = None
) -> None:
    directory = sysfs / "devices" / device
    directory.mkdir(parents=True)
    (directory / "size").write_text(f"{GIGABYTE}\n")
    (directory / "align").write_text(f"{align}\n")
    (sysfs / "bus/dax").mkdir(parents=True)
    (directory / "subsystem").symlink_to(sysfs / "bus/dax")
    if numa_node is not None:
        (directory.parent / "numa_node").write_text(f"{numa_node}\n")
    (sysfs / "dev/char").mkdir(parents=True)
    (sysfs / "dev/char" / numbers).symlink_to(directory)


def add_node(sysfs: Path, node: int, cpus: str) -> None:
    directory = sysfs / f"devices/system/node/node{node}"
    directory.mkdir(parents=True)
    (directory / "cpulist").write_text(f"{cpus}\n")


def examine_null(sysfs: Path) -> Place:
    """The sysfs says that /dev/null, which is 1:3, is a DAX device."""
    fd = os.open("/dev/null", os.O_RDWR)
    try:
        return examine(Path("/dev/null"), fd, sysfs)
    finally:
        os.close(fd)


def test_a_dax_device_on_an_nvdimm_bus_is_durable(sysfs: Path) -> None:
    add_device(sysfs, "ACPI0012:00/ndbus0/region0/dax0.1/dax0.0", "1:3", numa_node=1)
    place = examine_null(sysfs)
    assert place.kind is Kind.DEVDAX
    assert place.size_bytes == GIGABYTE
    assert place.numa_node == 1


def test_a_dax_device_of_memory_set_aside_is_not(sysfs: Path) -> None:
    add_device(sysfs, "platform/hmem.0/dax1.0", "1:3", numa_node=-1)
    place = examine_null(sysfs)
    assert place.kind is Kind.VOLATILE_DEVICE
    assert not place.kind.durable
    assert "not durable" in place.kind.value
    assert place.numa_node == -1


def test_a_device_of_larger_alignment_is_refused_with_advice(sysfs: Path) -> None:
    add_device(sysfs, "ndbus0/region0/dax0.0", "1:3", align=1 << 30)
    with pytest.raises(ConfigurationError, match="--align 2M"):
        examine_null(sysfs)


def test_another_character_device_is_refused(sysfs: Path) -> None:
    with pytest.raises(ConfigurationError, match="neither a file nor a DAX device"):
        examine_null(sysfs)


def affinity_after(sysfs: Path, nodes: list[int]) -> set[int]:
    """Of all threads of a process of its own: what it does would last."""
    program = (
        "import os, sys, threading, pathlib\n"
        "from storage_server.media.pmem_numa import run_near\n"
        "end = threading.Event(); threading.Thread(target=end.wait).start()\n"
        "run_near([int(node) for node in sys.argv[2:]], pathlib.Path(sys.argv[1]))\n"
        "seen = [os.sched_getaffinity(int(t)) for t in os.listdir('/proc/self/task')]\n"
        "assert len(seen) == 2 and seen[0] == seen[1]\n"
        "print(*seen[0]); end.set()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, sysfs, *map(str, nodes)],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    return {int(cpu) for cpu in done.stdout.split()}


def test_the_process_runs_on_the_node_of_its_regions(sysfs: Path) -> None:
    allowed = os.sched_getaffinity(0)
    cpu = max(allowed)
    add_node(sysfs, 0, "700")
    add_node(sysfs, 1, f"{cpu},900-903")
    assert affinity_after(sysfs, [1, 1]) == {cpu}
    # Of two nodes, of an unknown one, or of one whose processors are not ours: as it was.
    assert affinity_after(sysfs, [0, 1]) == allowed
    assert affinity_after(sysfs, [-1]) == allowed
    assert affinity_after(sysfs, []) == allowed
    assert affinity_after(sysfs, [0]) == allowed


def test_that_no_processor_of_the_node_is_ours_is_logged(
    sysfs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    add_node(sysfs, 0, "")
    run_near([0], sysfs)
    assert "none of whose processors is ours" in caplog.text
