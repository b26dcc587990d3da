from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from crailfs.errors import BusyError, ConfigurationError, UnavailableError
from crailfs.net.address import (
    UNIX_PATH_MAX_BYTES,
    Address,
    TcpAddress,
    UnixAddress,
    connect_socket,
    listen,
    parse_address,
)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("unix:/run/crail/metadata.sock", UnixAddress("/run/crail/metadata.sock")),
        ("node-1:9060", TcpAddress("node-1", 9060)),
        ("127.0.0.1:0", TcpAddress("127.0.0.1", 0)),
        ("[::1]:9060", TcpAddress("::1", 9060)),
    ],
)
def test_addresses_are_read_and_written(text: str, address: Address) -> None:
    assert parse_address(text) == address
    assert str(address) == text


@pytest.mark.parametrize(
    "text",
    [
        "", "node-1", ":9060", "node-1:", "node-1:port", "node-1:-1", "node-1:65536", "::1:9060",
        "[]:9060", "unix:", "unix:relative", "unix:/a\0b", "node-1:²",
        "unix:/" + "x" * UNIX_PATH_MAX_BYTES,
    ],
)  # fmt: skip
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="address"):
        parse_address(text)


def test_a_socket_file_is_its_owners_unless_told_otherwise(tmp_path: Path) -> None:
    for mode in (0o600, 0o666):
        listener = listen(UnixAddress(f"{tmp_path}/s"), unix_mode=mode)
        assert stat.S_IMODE(os.stat(f"{tmp_path}/s").st_mode) == mode & ~0o022
        listener.close()
        assert not (tmp_path / "s").exists()


def test_a_stale_socket_file_is_replaced(tmp_path: Path) -> None:
    path = f"{tmp_path}/s"
    with socket.socket(socket.AF_UNIX) as abandoned:
        abandoned.bind(path)
    listener = listen(UnixAddress(path))
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
    listener.close()


def test_a_socket_that_is_listened_on_is_left_alone(tmp_path: Path) -> None:
    path = f"{tmp_path}/s"
    listener = listen(UnixAddress(path))
    with pytest.raises(BusyError, match="another process"):
        listen(UnixAddress(path))
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
    listener.close()


def test_another_file_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_text("precious")
    with pytest.raises(BusyError, match="not a socket"):
        listen(UnixAddress(str(path)))
    assert path.read_text() == "precious"


def test_a_closed_listener_leaves_a_successors_file(tmp_path: Path) -> None:
    path = f"{tmp_path}/s"
    old = listen(UnixAddress(path))
    os.unlink(path)
    new = listen(UnixAddress(path))
    old.close()
    assert os.path.exists(path)
    new.close()


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    listener = listen(TcpAddress("127.0.0.1", 0))
    assert isinstance(listener.address, TcpAddress) and listener.address.port != 0
    with pytest.raises(BusyError, match=str(listener.address)):
        listen(listener.address)
    listener.close()


def test_a_place_that_cannot_be_bound_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match=r"192\.0\.2\.1"):
        listen(TcpAddress("192.0.2.1", 0))
    with pytest.raises(UnavailableError, match="missing/s"):
        listen(UnixAddress(f"{tmp_path}/missing/s"))


async def test_connecting_to_nobody_is_an_error(tmp_path: Path) -> None:
    listener = listen(TcpAddress("127.0.0.1", 0))
    listener.close()
    with pytest.raises(ConnectionRefusedError):
        await connect_socket(listener.address)
    with pytest.raises(FileNotFoundError):
        await connect_socket(UnixAddress(f"{tmp_path}/nothing"))
