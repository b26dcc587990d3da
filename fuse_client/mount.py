"""Serves one mount, from mounting to unmounting."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path
from typing import Final

import pyfuse3
import trio

from crailfs.client.filesystem import FileSystem
from crailfs.config import MountConfig
from crailfs.errors import BusyError, ConfigurationError
from crailfs.wire.messages import Invalidation
from fuse_client import hot_wait
from fuse_client.invalidation import DirectoryChanges, KernelInvalidator
from fuse_client.mountpoints import Mount, find_mount
from fuse_client.operations import Operations, in_flight
from fuse_client.watchdog import watched

log = logging.getLogger(__name__)

IDLE_TASKS: Final = 8
"""Tasks kept for the next request; fewer are made and dropped all the time under load."""
TASKS_MAX: Final = 64
"""Requests served at once, each with a buffer of 1 MiB; the kernel keeps the others."""
CLOSE_TIMEOUT_S: Final = 40.0
"""For committing what is open when the mount ends: a little over an operation's own deadline."""


async def mount(config: MountConfig) -> None:
    """Mounts at ``config.mountpoint`` and serves until it is unmounted or this is cancelled.

    Both ways everything open is committed first. One mount a process: libfuse's session is global.
    Raises ``ConfigurationError`` if the mount point is not a directory, ``BusyError`` if CrailFS is
    mounted there already or the kernel refuses, and whatever connecting raises.
    """
    _check_mountpoint(config.mountpoint)
    async with FileSystem.connect(config.client) as file_system:
        await serve_mounted(file_system, config)


async def serve_mounted(file_system: FileSystem, config: MountConfig) -> None:
    """As ``mount``, with a file system that is connected already."""
    changes = DirectoryChanges()
    operations = Operations(file_system, changes)
    _mount_in_kernel(operations, config)
    with contextlib.ExitStack() as watchdog:
        try:
            mounted = find_mount(config.mountpoint)
            if mounted is None:
                raise BusyError(f"{config.mountpoint} was unmounted while it was being mounted")
            watchdog.enter_context(watched(mounted))
            await _serve(file_system, operations, changes, mounted, config)
        finally:
            pyfuse3.close(unmount=True)


async def _serve(
    file_system: FileSystem,
    operations: Operations,
    changes: DirectoryChanges,
    mounted: Mount,
    config: MountConfig,
) -> None:
    async with trio.open_nursery() as nursery:
        invalidator = KernelInvalidator(nursery, changes)

        async def on_invalidate(invalidations: tuple[Invalidation, ...]) -> None:
            operations.forget_pages(invalidations)
            await invalidator.invalidate(invalidations)

        async def finish_mounting() -> None:
            await operations.initialized.wait()
            # Not earlier: with its first request the kernel sets its own default.
            _set_read_ahead(mounted, config.read_ahead_kib)
            if config.foreground_ready_fd >= 0:
                os.write(config.foreground_ready_fd, b"\n")

        file_system.on_invalidate = on_invalidate
        nursery.start_soon(finish_mounting)
        hot_wait.install(in_flight)
        try:
            await pyfuse3.main(min_tasks=IDLE_TASKS, max_tasks=TASKS_MAX)
        finally:
            file_system.on_invalidate = None
            with trio.move_on_after(CLOSE_TIMEOUT_S, shield=True) as scope:
                await operations.close_files()
            if scope.cancelled_caught:
                log.error("the mount ended before all that was open could be committed")
            nursery.cancel_scope.cancel()


def _check_mountpoint(mountpoint: Path) -> None:
    mounted = find_mount(mountpoint)
    if mounted is not None:
        raise BusyError(
            f"{mountpoint} is already mounted from {mounted.source}: use it, or unmount it first "
            f"with 'crail umount {mountpoint}'"
        )
    if not mountpoint.is_dir():
        raise ConfigurationError(f"mount point {mountpoint} is not a directory: make it first")


def _mount_in_kernel(operations: Operations, config: MountConfig) -> None:
    options = {"default_permissions", "fsname=crailfs", "subtype=crailfs"}
    if config.allow_other and os.geteuid() == 0:
        options.add("allow_other")
    try:
        pyfuse3.init(operations, str(config.mountpoint), options)
    except RuntimeError as error:
        raise BusyError(
            f"cannot mount at {config.mountpoint}: {error}; fuse3 must be installed, /dev/fuse "
            "accessible and the mount point yours (the line above this one names the cause)"
        ) from error


def _set_read_ahead(mounted: Mount, read_ahead_kib: int) -> None:
    """Larger than the kernel's 128 KiB, so that a sequential reader has few trips to wait for."""
    path = Path("/sys/class/bdi") / mounted.device / "read_ahead_kb"
    try:
        path.write_text(str(read_ahead_kib))
    except OSError as error:
        log.info("read-ahead stays at the kernel's default: %s: %s", path, error.strerror)
