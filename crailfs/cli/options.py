"""Options that several subcommands share."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from crailfs.config_file import Settings, find_file

if TYPE_CHECKING:
    from crailfs.target import Target


def add_config_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="crail.toml (default: $CRAIL_CONFIG, else /etc/crail/crail.toml)",
    )
    parser.add_argument(
        "--set",
        dest="overrides",
        metavar="SECTION.KEY=VALUE",
        action="append",
        default=[],
        help="override one setting (repeatable)",
    )


def add_cluster_options(parser: argparse.ArgumentParser) -> None:
    """For commands that talk to a running file system: of a cluster, or an embedded one."""
    add_config_options(parser)
    parser.add_argument(
        "--at",
        metavar="MOUNTPOINT",
        help="the file system that `crail up MOUNTPOINT` started (default, without a configuration "
        "file: the only one that runs)",
    )


def add_ready_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ready-fd",
        metavar="N",
        type=int,
        default=-1,
        help="write one line of JSON to this descriptor when ready, or when the start failed",
    )


def server_settings(options: argparse.Namespace) -> Settings:
    return Settings.load(find_file(options.config), options.overrides)


def target_of(options: argparse.Namespace) -> Target:
    """The file system that the command line means. Raises as ``find_target``."""
    from crailfs.target import find_target

    return find_target(at=options.at, config=options.config, overrides=options.overrides)
