"""Addresses (``unix:/path``, ``host:port``, ``[v6]:port``) and the sockets behind them."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from typing import Final, NamedTuple

import trio

from crailfs.errors import BusyError, ConfigurationError, UnavailableError

UNIX_PATH_MAX_BYTES: Final = 107
"""What the kernel's ``sockaddr_un`` holds besides the final zero."""
LISTEN_BACKLOG: Final = 1_024
KEEPALIVE_IDLE_S: Final = 10
KEEPALIVE_INTERVAL_S: Final = 5
KEEPALIVE_PROBES: Final = 3
UNACKNOWLEDGED_MAX_MS: Final = 30_000
"""A TCP peer that acknowledges nothing for this long is gone."""


class UnixAddress(NamedTuple):
    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"


class TcpAddress(NamedTuple):
    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


Address = UnixAddress | TcpAddress


def parse_address(text: str) -> Address:
    """Raises ``ConfigurationError`` that says what was expected."""
    if text.startswith("unix:"):
        path = text.removeprefix("unix:")
        if not path.startswith("/") or "\0" in path:
            raise ConfigurationError(f"address {text!r}: expected 'unix:' and an absolute path")
        if len(os.fsencode(path)) > UNIX_PATH_MAX_BYTES:
            raise ConfigurationError(
                f"address {text!r}: the path has {len(os.fsencode(path))} bytes, a Unix socket's"
                f" may have {UNIX_PATH_MAX_BYTES}; use a shorter directory"
            )
        return UnixAddress(path)
    host, colon, port_text = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        colon = ""
    if not (colon and host and port_text.isascii() and port_text.isdigit()):
        raise ConfigurationError(
            f"address {text!r}: expected 'unix:/path', 'host:port' or '[IPv6 address]:port'"
        )
    if int(port_text) > 65_535:
        raise ConfigurationError(f"address {text!r}: ports end at 65535")
    return TcpAddress(host, int(port_text))


def tune(sock: socket.socket) -> None:
    """Non-blocking; on TCP no delay for small frames, and a vanished peer is noticed."""
    sock.setblocking(False)
    if sock.family == socket.AF_UNIX:
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNACKNOWLEDGED_MAX_MS)


async def connect_socket(address: Address) -> socket.socket:
    """A connected, tuned socket. Raises ``OSError`` of the last place that was tried; the caller
    sets the deadline."""
    if isinstance(address, UnixAddress):
        return await _connect(socket.AF_UNIX, address.path)
    places = await trio.socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    failure: OSError | None = None
    for family, _, _, _, place in places:
        try:
            return await _connect(family, place)
        except OSError as error:
            failure = error
    raise failure or OSError(errno.EADDRNOTAVAIL, f"{address.host} has no address")


async def _connect(family: int, place: str | tuple[object, ...]) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        tune(sock)
        code = sock.connect_ex(place)
        if code == errno.EINPROGRESS:
            await trio.lowlevel.wait_writable(sock)
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, f"{os.strerror(code)}: {place}")
    except BaseException:
        sock.close()
        raise
    return sock


class Listener(NamedTuple):
    sock: socket.socket
    address: Address
    """As bound: with the port that the kernel chose."""
    file_inode: int = 0
    """Of a Unix socket's file."""

    def close(self) -> None:
        """Closes it; a Unix socket's file goes if it is still this listener's."""
        if isinstance(self.address, UnixAddress):
            with contextlib.suppress(FileNotFoundError):
                if os.stat(self.address.path).st_ino == self.file_inode:
                    os.unlink(self.address.path)
        self.sock.close()


def listen(address: Address, *, unix_mode: int = 0o600) -> Listener:
    """A listening, non-blocking socket.

    A socket file that nobody listens on any more is replaced. Raises ``BusyError`` if somebody
    does, or if the path is another kind of file, and ``UnavailableError`` if the address cannot be
    bound.
    """
    if isinstance(address, UnixAddress):
        _remove_stale_socket(address.path)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        place: object = address.path
    else:
        try:
            found = socket.getaddrinfo(
                address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
        except OSError as error:
            raise UnavailableError(f"cannot listen on {address}: {error}") from error
        family, _, _, _, place = found[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        if isinstance(address, UnixAddress):
            # Before bind, so that there is no instant at which others could connect.
            os.fchmod(sock.fileno(), unix_mode)
        sock.bind(place)  # type: ignore[arg-type]
        sock.listen(LISTEN_BACKLOG)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise BusyError(
                f"cannot listen on {address}: another process does; stop it or choose another"
                " address"
            ) from error
        raise UnavailableError(f"cannot listen on {address}: {error}") from error
    sock.setblocking(False)
    if isinstance(address, UnixAddress):
        return Listener(sock, address, os.stat(address.path).st_ino)
    host, port = sock.getsockname()[:2]
    return Listener(sock, TcpAddress(host, port))


def _remove_stale_socket(path: str) -> None:
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise BusyError(f"{path} exists and is not a socket: remove it or choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        code = probe.connect_ex(path)
    if code != errno.ECONNREFUSED:
        raise BusyError(
            f"cannot listen on unix:{path}: another process does; stop it or choose another path"
        )
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
