"""Which port is chosen, and what is said where there is none."""

from __future__ import annotations

import ipaddress
import socket
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from crailfs.errors import InvalidError, ProtocolError, UnavailableError
from crailfs.rdma import device as rdma_device
from crailfs.rdma.device import find_port
from crailfs.rdma.queue_pair import check_end, check_region
from crailfs.records import StorageServerInfo
from crailfs.transports import connect
from crailfs.wire.messages import QueuePairEnd, RemoteRegion
from tests.storage.cluster import FakeMetadata, client_config

LINK_LOCAL = "fe80::5054:ff:fe12:3456"
NONE = "::"


@pytest.fixture
def devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the kernel shows of RDMA devices: none as yet."""
    monkeypatch.setattr(rdma_device, "_SYSFS", tmp_path / "infiniband")
    (tmp_path / "infiniband").mkdir()
    return tmp_path / "infiniband"


def add_port(
    devices: Path,
    name: str,
    *gids: tuple[str, str],
    state: str = "4: ACTIVE",
    link_layer: str = "Ethernet",
) -> None:
    port = devices / name / "ports" / "1"
    (port / "gids").mkdir(parents=True)
    (port / "gid_attrs" / "types").mkdir(parents=True)
    (port / "state").write_text(f"{state}\n")
    (port / "link_layer").write_text(f"{link_layer}\n")
    for index, (gid, kind) in enumerate(gids):
        (port / "gids" / str(index)).write_text(f"{ipaddress.IPv6Address(gid).exploded}\n")
        if kind:
            (port / "gid_attrs" / "types" / str(index)).write_text(f"{kind}\n")


def remote_server(tcp_host: str) -> StorageServerInfo:
    return StorageServerInfo(
        id=bytes(16), host="h", rack="", unix_path="", tcp_host=tcp_host, tcp_port=0,
        boot_id="another", rdma=True,
    )  # fmt: skip


def test_takes_the_ipv4_address_of_an_active_port(devices: Path) -> None:
    add_port(devices, "down0", ("::ffff:10.0.0.9", "RoCE v2"), state="1: DOWN")
    add_port(devices, "ib0", ("fe80::1", "IB/RoCE v1"), link_layer="InfiniBand")
    add_port(
        devices,
        "roce0",
        (LINK_LOCAL, "RoCE v2"),
        ("::ffff:10.0.0.1", "IB/RoCE v1"),
        ("::ffff:10.0.0.1", "RoCE v2"),
        (NONE, ""),
    )
    port = find_port("auto")
    assert (port.device, port.number, port.gid_index, port.address) == ("roce0", 1, 2, "10.0.0.1")


def test_prefers_the_address_that_the_peer_is_reached_from(devices: Path) -> None:
    add_port(devices, "a", ("::ffff:10.0.0.1", "RoCE v2"))
    add_port(devices, "b", ("::ffff:10.0.1.1", "RoCE v2"), ("2001:db8::7", "RoCE v2"))
    assert find_port("auto").device == "a"
    assert find_port("auto", near="10.0.1.1").device == "b"
    assert find_port("auto", near="2001:db8::7").gid_index == 1
    assert find_port("a", near="10.0.1.1").device == "a"


def test_says_what_is_missing(devices: Path) -> None:
    with pytest.raises(UnavailableError, match="rdma_device is off"):
        find_port("off")
    with pytest.raises(UnavailableError, match="no RDMA device has an active"):
        find_port("auto")
    with pytest.raises(UnavailableError, match="there is no RDMA device mlx5_9"):
        find_port("mlx5_9")
    add_port(devices, "roce0", state="1: DOWN")
    with pytest.raises(UnavailableError, match="RDMA device roce0 is there, but"):
        find_port("roce0")


def test_a_device_that_is_taken_out_meanwhile_is_passed_over(devices: Path) -> None:
    (devices / "a").mkdir()
    add_port(devices, "b", ("::ffff:10.0.0.1", "RoCE v2"))
    (devices / "b" / "ports" / "1" / "gids" / "0").rename(devices / "gid")
    (devices / "b" / "ports" / "1" / "gids" / "0").mkdir()  # not to be read
    add_port(devices, "c", ("::ffff:10.0.0.2", "RoCE v2"))
    assert find_port("auto").device == "c"
    with pytest.raises(UnavailableError, match="RDMA device a is there, but"):
        find_port("a")


async def test_a_slow_resolver_holds_up_nobody_else(
    devices: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others_went_on = threading.Event()
    waited: list[bool] = []

    def resolve(*arguments: Any, **_: object) -> object:
        if not (len(arguments) == 6 and arguments[5] & socket.AI_NUMERICHOST):
            waited.append(others_went_on.wait(5))
        raise socket.gaierror(socket.EAI_NONAME, "no such name")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    config = client_config(FakeMetadata(), "rdma")
    async with trio.open_nursery() as nursery:

        async def go_on() -> None:
            others_went_on.set()

        nursery.start_soon(go_on)
        with pytest.raises(UnavailableError):
            await connect(remote_server("storage.example"), config, 1, nursery)
    assert waited == [True]


async def test_without_a_device_another_transport_is_taken_or_the_reason_told(
    devices: Path, tmp_path: Path
) -> None:
    server = remote_server("127.0.0.1")
    config = client_config(FakeMetadata(), "rdma", "tcp")
    async with trio.open_nursery() as nursery:
        with pytest.raises(UnavailableError, match=r"rdma: .*(pyverbs|no RDMA device).*; tcp: "):
            await connect(server, config, 1, nursery)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("gid", b""),
        ("gid", bytes(17)),
        ("gid", bytes(16)),
        ("number", -1),
        ("number", 1),
        ("number", 1 << 24),
        ("packet_sequence", 1 << 24),
        ("packet_sequence", -1),
        ("mtu", 0),
        ("mtu", 6),
        ("reads_max", -1),
        ("reads_max", 256),
    ],
)
def test_ends_that_cannot_be_are_refused(field: str, value: object) -> None:
    good = {
        "gid": b"\1" * 16,
        "number": 17,
        "packet_sequence": 5,
        "mtu": 3,
        "can_flush": True,
        "reads_max": 16,
    }
    check_end(QueuePairEnd(**good))  # type: ignore[arg-type]
    with pytest.raises(InvalidError):
        check_end(QueuePairEnd(**good | {field: value}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        {"key": -1},
        {"key": 1 << 32},
        {"address": -1},
        {"address": 1 << 64},
        {"address": (1 << 64) - 4095},
        {"byte_count": 0},
        {"byte_count": -1},
        {"byte_count": 1 << 65},
    ],
    ids=str,
)
def test_regions_that_cannot_be_are_refused(change: dict[str, int]) -> None:
    good = RemoteRegion(
        region_id=1, address=(1 << 64) - 4096, key=(1 << 32) - 1, byte_count=4096,
        can_flush=False, flush_on_request=False,
    )  # fmt: skip
    check_region(good)
    with pytest.raises(ProtocolError, match="region 1 cannot be"):
        check_region(msgspec.structs.replace(good, **change))
