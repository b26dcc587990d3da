"""Fixtures of the hardware lab; without one (``CRAIL_LAB`` is not set) its tests are skipped.

What ``scripts/lab`` sets, and what a fixture here hands to a test:

===================== ===================== ====================================================
variable              fixture               what it is
===================== ===================== ====================================================
CRAIL_LAB             (all)                 ``guest`` or ``host``
CRAIL_LAB_DEVDAX      ``devdax``            a devdax device, e.g. /dev/dax0.0
CRAIL_LAB_FSDAX       ``fsdax``             a directory of a file system mounted ``-o dax``
CRAIL_LAB_NVME        ``nvme``              a whole NVMe disk, e.g. /dev/nvme0n1
CRAIL_LAB_RDMA_DEVICE ``rdma_device``       an RDMA device's name, e.g. rxe0
CRAIL_LAB_NIC         ``nic``               the network interface that the RDMA device is on
CRAIL_LAB_ADDRESS     ``address``           this host's IPv4 address there
CRAIL_LAB_PEER        ``peer``              the other host
CRAIL_LAB_PEER_AGENT                        how ``peer`` is reached where it is not a guest
CRAIL_LAB_OUT         ``out``               a directory whose files are kept with the results
===================== ===================== ====================================================

A test whose device the lab does not have is skipped. Every device may be overwritten.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.lab.peer import Peer

HERE = Path(__file__).resolve().parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("CRAIL_LAB") in ("guest", "host"):
        return
    skip = pytest.mark.skip(reason="needs the hardware lab: scripts/lab")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(skip)


def _named(variable: str) -> str:
    value = os.environ.get(variable)
    if not value:
        pytest.skip(f"this lab has no {variable}")
    return value


@pytest.fixture(scope="session")
def devdax() -> Path:
    return Path(_named("CRAIL_LAB_DEVDAX"))


@pytest.fixture(scope="session")
def fsdax() -> Path:
    return Path(_named("CRAIL_LAB_FSDAX"))


@pytest.fixture(scope="session")
def nvme() -> Path:
    return Path(_named("CRAIL_LAB_NVME"))


@pytest.fixture(scope="session")
def rdma_device() -> str:
    return _named("CRAIL_LAB_RDMA_DEVICE")


@pytest.fixture(scope="session")
def nic() -> str:
    return _named("CRAIL_LAB_NIC")


@pytest.fixture(scope="session")
def address() -> str:
    return _named("CRAIL_LAB_ADDRESS")


@pytest.fixture(scope="session")
def out() -> Path:
    return Path(_named("CRAIL_LAB_OUT"))


@pytest.fixture(scope="session")
def peer() -> Peer:
    return Peer(_named("CRAIL_LAB_PEER"), os.environ.get("CRAIL_LAB_PEER_AGENT"))
