"""A server in the foreground: logging, ready notice, clean stop on SIGTERM and SIGINT."""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import socket
from collections.abc import Awaitable, Callable
from typing import Any, Final

import trio

from crailfs.cli.exit_codes import exit_code_of
from crailfs.cli.logs import set_up_logging
from crailfs.cli.main import error_of
from crailfs.errors import CrailError
from crailfs.limits import CONNECTIONS_MAX

log = logging.getLogger(__name__)

_OTHER_DESCRIPTORS: Final = 1_024
"""Files, regions, life lines, and connections to other servers."""

Serve = Callable[["trio.TaskStatus[list[str]]"], Awaitable[None]]
"""Serves until it is cancelled or has nothing more to serve; passes to ``started`` where it can be
reached."""


def run_server(name: str, prepare: Callable[[], Serve], ready_fd: int) -> int:
    """Prepare and serve until a signal or until the server returns; 0 when that was clean.

    Whoever waits is told: one line of JSON on ``ready_fd`` (-1: nobody), ``READY=1`` to systemd.
    The line is ``{"ready": [where, ...]}``, or ``{"error": message, "exit_code": n}``.
    """
    notice = _ReadyNotice(ready_fd)
    try:
        set_up_logging("info")
        _raise_descriptor_limit()
        trio.run(_serve, name, prepare(), notice)
    except BaseException as error:
        known = error_of(error) or CrailError(f"{type(error).__name__}: {error}")
        notice.send({"error": known.message, "exit_code": int(exit_code_of(known))})
        raise
    log.info("%s stopped", name)
    return 0


def _raise_descriptor_limit() -> None:
    """As many connections as the limits allow need as many descriptors; the usual soft limit is
    1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = CONNECTIONS_MAX + _OTHER_DESCRIPTORS
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def notify_systemd(message: str) -> None:
    """Tell systemd's ``Type=notify`` what we do; outside of systemd there is nobody to tell."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifier:
        notifier.connect("\0" + address[1:] if address.startswith("@") else address)
        notifier.sendall(message.encode())


class _ReadyNotice:
    """Sent once at most: after the start has succeeded, a later failure is for the log."""

    def __init__(self, ready_fd: int) -> None:
        self._fd = ready_fd

    def send(self, report: dict[str, Any]) -> None:
        if self._fd < 0:
            return
        fd, self._fd = self._fd, -1
        with os.fdopen(fd, "w") as line:
            line.write(json.dumps(report) + "\n")


async def _serve(name: str, serve: Serve, notice: _ReadyNotice) -> None:
    async with trio.open_nursery() as nursery:
        await nursery.start(_stop_on_signal, name, nursery.cancel_scope)

        async def run(*, task_status: trio.TaskStatus[list[str]]) -> None:
            await serve(task_status)
            nursery.cancel_scope.cancel()

        where: list[str] = await nursery.start(run)
        log.info("%s ready: %s", name, ", ".join(where))
        notify_systemd("READY=1")
        notice.send({"ready": where})


async def _stop_on_signal(
    name: str,
    scope: trio.CancelScope,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        task_status.started()
        async for number in signals:
            log.info("%s stops: %s", name, signal.Signals(number).name)
            notify_systemd("STOPPING=1")
            scope.cancel()
            return
