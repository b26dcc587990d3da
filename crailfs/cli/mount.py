"""``crail mount``: mount a cluster's file system, in the foreground until it is unmounted."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from crailfs.cli.options import add_config_options, add_ready_option, server_settings

if TYPE_CHECKING:
    import trio

    from crailfs.cli.serving import Serve

EXAMPLES = """\
  crail mount /crail --config /etc/crail/crail.toml
  crail mount /crail --set cluster.metadata=meta1:9060 --set cluster.secret_file=/etc/crail/secret
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "mountpoint",
        metavar="MOUNTPOINT",
        nargs="?",
        help="an existing directory (default: mount.mountpoint of the configuration)",
    )
    parser.add_argument(
        "--nonempty", action="store_true", help="mount over a directory that is not empty"
    )
    add_config_options(parser)
    add_ready_option(parser)


def run(options: argparse.Namespace) -> int:
    from crailfs.cli.serving import run_server

    if options.mountpoint is not None:
        options.overrides.append(f"mount.mountpoint={options.mountpoint}")

    def prepare() -> Serve:
        import trio

        from crailfs.embedded.mountpoint import prepare_mountpoint
        from fuse_client.mount import mount

        config = server_settings(options).mount()
        prepare_mountpoint(config.mountpoint, allow_nonempty=options.nonempty)

        async def serve_configured(task_status: trio.TaskStatus[list[str]]) -> None:
            ready_read, ready_write = os.pipe()
            os.set_blocking(ready_read, False)
            async with trio.open_nursery() as nursery:

                async def mount_until_unmounted() -> None:
                    await mount(msgspec.structs.replace(config, foreground_ready_fd=ready_write))
                    nursery.cancel_scope.cancel()

                nursery.start_soon(mount_until_unmounted)
                await trio.lowlevel.wait_readable(ready_read)
                os.close(ready_read)
                task_status.started([str(Path(config.mountpoint))])

        return serve_configured

    return run_server("mount", prepare, options.ready_fd)
