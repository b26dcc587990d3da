"""Running on the processors that persistent memory hangs on: others reach it at a fraction of its
speed, and their flushes cross the link between the sockets."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from storage_server.media.pmem_place import SYSFS

log = logging.getLogger(__name__)


def run_near(nodes: Sequence[int], sysfs: Path = SYSFS) -> None:
    """Keep all threads of this process, and those to come, on the processors of ``nodes`` (of each
    region in persistent memory its NUMA node; -1: none is known), if they are all the same. Leaves
    everything as it is if the process may use none of these processors."""
    if not nodes or nodes[0] < 0 or len(set(nodes)) > 1:
        return
    node = nodes[0]
    cpus = _cpus((sysfs / f"devices/system/node/node{node}/cpulist").read_text())
    allowed = os.sched_getaffinity(0)
    if not cpus & allowed:
        log.warning("persistent memory is on NUMA node %d, none of whose processors is ours", node)
        return
    if allowed <= cpus:
        return
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread), cpus & allowed)
    log.info("running on the %d processors of NUMA node %d", len(cpus & allowed), node)


def _cpus(text: str) -> set[int]:
    """Of the kernel's ``0-3,8``; empty for a node without processors."""
    cpus: set[int] = set()
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            cpus.update(range(int(first), int(last or first) + 1))
    return cpus
