"""``crail metadata``: a metadata server in the foreground."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from crailfs.cli.options import add_config_options, add_ready_option, server_settings

if TYPE_CHECKING:
    import trio

    from crailfs.cli.serving import Serve

EXAMPLES = """\
  crail metadata --config /etc/crail/crail.toml
  crail metadata --set metadata.listen=127.0.0.1:0 --set metadata.state=/srv/crail/metadata
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_options(parser)
    add_ready_option(parser)


def run(options: argparse.Namespace) -> int:
    from crailfs.cli.serving import run_server

    def prepare() -> Serve:
        from metadata_server.server import serve

        config = server_settings(options).metadata()

        async def serve_configured(task_status: trio.TaskStatus[list[str]]) -> None:
            await serve(config, task_status=task_status)

        return serve_configured

    return run_server("metadata server", prepare, options.ready_fd)
