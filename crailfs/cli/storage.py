"""``crail storage``: a storage server in the foreground."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from crailfs.cli.options import add_config_options, add_ready_option, server_settings

if TYPE_CHECKING:
    import trio

    from crailfs.cli.serving import Serve

EXAMPLES = """\
  crail storage --config /etc/crail/crail.toml
  crail storage --set cluster.metadata=meta1:9060 --set storage.rack=r7
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_options(parser)
    add_ready_option(parser)


def run(options: argparse.Namespace) -> int:
    from crailfs.cli.serving import run_server

    def prepare() -> Serve:
        from storage_server.server import serve

        config = server_settings(options).storage()

        async def serve_configured(task_status: trio.TaskStatus[list[str]]) -> None:
            await serve(config, task_status=task_status)

        return serve_configured

    return run_server("storage server", prepare, options.ready_fd)
