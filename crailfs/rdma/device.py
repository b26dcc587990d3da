"""Which device, port and address RDMA uses, and what that device can.

Ports and their addresses (GIDs) are read from ``/sys/class/infiniband``, which needs no library.
Only RoCE v2 is used: its addresses are IP addresses, so the network routes it and its peers are
named as those of the control connection are.
"""

from __future__ import annotations

import atexit
import contextlib
import ipaddress
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import trio

from crailfs.errors import UnavailableError
from crailfs.limits import CONNECT_TIMEOUT_MS
from crailfs.rdma.buffers import BufferPool, Registration
from crailfs.rdma.verbs import Verbs, load, plain_errors

AUTO: Final = "auto"
OFF: Final = "off"
GID_BYTES: Final = 16

_SYSFS: Final = Path("/sys/class/infiniband")
_FLUSH_CAPABILITIES: Final = (1 << 38) | (1 << 39)
"""IB_UVERBS_DEVICE_FLUSH_GLOBAL and _PERSISTENT (rdma/ib_user_verbs.h), which pyverbs lacks."""


class Port(NamedTuple):
    device: str
    number: int
    gid_index: int
    gid: bytes

    @property
    def address(self) -> str:
        """The IP address that the GID is."""
        return _address(self.gid)


def find_port(device: str, near: str = "") -> Port:
    """A RoCE v2 address of ``device`` (a verbs name or ``auto``): of those on active ports the one
    that is the IP address ``near``, else the first IPv4 one, else the first.

    Raises ``UnavailableError`` if there is none, or if ``device`` is ``off``.
    """
    if device == OFF:
        raise UnavailableError("rdma_device is off")
    if device != AUTO and not (_SYSFS / device).is_dir():
        raise UnavailableError(f"there is no RDMA device {device}: check rdma_device")
    ports = list(_active_ports(None if device == AUTO else device))
    if not ports:
        which = "no RDMA device" if device == AUTO else f"RDMA device {device} is there, but it"
        raise UnavailableError(f"{which} has an active Ethernet port with a RoCE v2 address")
    return min(ports, key=lambda port: (port.address != near, ":" in port.address))


async def source_address(host: str) -> str:
    """The address that this host sends from to reach ``host``; empty if that is not known."""
    try:
        with trio.fail_after(CONNECT_TIMEOUT_MS / 1000):
            places = await trio.socket.getaddrinfo(host, 4791, type=socket.SOCK_DGRAM)
        family, kind, _, _, address = places[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except (OSError, trio.TooSlowError):
        return ""


class Device:
    """An opened device; its pool holds the memory that is registered with it for this process."""

    def __init__(self, port: Port) -> None:
        """Raises ``UnavailableError``."""
        self.port = port
        self.verbs: Verbs = load()
        with plain_errors(f"opening RDMA device {port.device}"):
            self.context: Any = self.verbs.device.Context(name=port.device)
            self.domain: Any = self.verbs.pd.PD(self.context)
            attributes = self.context.query_device()
            port_attributes = self.context.query_port(port.number)
            capabilities = self.context.query_device_ex().device_cap_flags_ex
        self.can_flush = capabilities & _FLUSH_CAPABILITIES == _FLUSH_CAPABILITIES and hasattr(
            self.verbs.enums, "IBV_QP_EX_WITH_FLUSH"
        )
        self.mtu: int = port_attributes.active_mtu
        self.message_max_bytes: int = port_attributes.max_msg_sz
        self.requests_max: int = attributes.max_qp_wr
        self.reads_as_target_max: int = min(attributes.max_qp_rd_atom, 255)
        self.reads_as_initiator_max: int = min(attributes.max_qp_init_rd_atom, 255)
        self.pool = BufferPool(self._register_buffer)

    def register(self, address: int, byte_count: int, access: int) -> Any:
        """A memory region (``ibv_mr``), which locks the memory: RLIMIT_MEMLOCK counts. Raises
        ``UnavailableError``."""
        with plain_errors(f"registering memory with {self.port.device}"):
            return self.verbs.mr.MR(self.domain, byte_count, access, address=address)

    @property
    def is_there(self) -> bool:
        """Whether the device still answers: one may be taken out, and put in again."""
        try:
            self.context.query_port(self.port.number)
        except self.verbs.error:
            return False
        return True

    def close(self) -> None:
        """After it nothing that was made with the device works any more, nor does any harm."""
        with contextlib.suppress(self.verbs.error):
            self.context.close()

    def _register_buffer(self, address: int, byte_count: int) -> Registration:
        region = self.register(address, byte_count, self.verbs.enums.IBV_ACCESS_LOCAL_WRITE)
        return Registration(region.lkey, region)


_opened: Final[dict[Port, Device]] = {}
_gone: Final[list[Device]] = []
"""Opened once, and not there any more."""


def open_device(name: str, near: str = "") -> Device:
    """The device of ``find_port``, the same for all of this process that use it.

    It stays open until the process ends: what was made with a device must go before it, and the
    garbage collector, given all of it at once, does not keep to that order but crashes.

    Raises ``UnavailableError``.
    """
    load()
    port = find_port(name, near)
    device = _opened.get(port)
    if device is not None and not device.is_there:
        _gone.append(_opened.pop(port))
        device = None
    if device is None:
        if not _opened and not _gone:
            atexit.register(_close_all, os.getpid())
        device = _opened[port] = Device(port)
    return device


def _close_all(opened_by: int) -> None:
    if os.getpid() != opened_by:
        return  # a child process: they are its parent's
    for device in (*_opened.values(), *_gone):
        device.close()


def _active_ports(device: str | None) -> Iterator[Port]:
    if not _SYSFS.is_dir():
        return
    for found in sorted(_SYSFS.iterdir()) if device is None else [_SYSFS / device]:
        for port in _numbered(found / "ports"):
            if "ACTIVE" not in _read(port / "state") or _read(port / "link_layer") != "Ethernet":
                continue
            for entry in _numbered(port / "gids"):
                kind, gid = _read(port / "gid_attrs" / "types" / entry.name), _read(entry)
                if kind == "RoCE v2" and gid:
                    packed = ipaddress.IPv6Address(gid).packed
                    yield Port(found.name, int(port.name), int(entry.name), packed)


def _numbered(directory: Path) -> list[Path]:
    """None if the device was taken out meanwhile."""
    try:
        return sorted(directory.iterdir(), key=lambda path: int(path.name))
    except OSError:
        return []


def _read(path: Path) -> str:
    """Entries of the GID table that are not in use answer EINVAL; those of a device that was taken
    out are not there."""
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _address(gid: bytes) -> str:
    address = ipaddress.IPv6Address(gid)
    return str(address.ipv4_mapped or address)
