"""Options that several subcommands share."""

from __future__ import annotations

import argparse
from pathlib import Path

from crailfs.config_file import Settings, find_file
from crailfs.errors import ConfigurationError


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


def cluster_settings(options: argparse.Namespace) -> Settings:
    """Settings to reach the file system that the command line means.

    Raises:
        ConfigurationError: none is named, and not exactly one embedded file system runs.
        UnavailableError: the one that ``--at`` names does not run.
    """
    from crailfs.embedded import registry

    if options.at is not None:
        state = registry.running_state_at(Path(options.at))
        return Settings.load(state.config_file, options.overrides, environment={})
    file = find_file(options.config)
    if file is not None:
        return Settings.load(file, options.overrides)
    settings = Settings.load(None, options.overrides)
    if settings.is_set("cluster", "metadata"):
        return settings
    running = registry.running_states()
    if len(running) == 1:
        state = running[0][1]
        return Settings.load(state.config_file, options.overrides, environment={})
    if running:
        points = ", ".join(str(mountpoint) for mountpoint, _ in running)
        raise ConfigurationError(f"several file systems run here ({points}): name one with --at")
    raise ConfigurationError(
        "no file system is named and none runs here: start one with `crail up MOUNTPOINT`, or name "
        "a configuration file with --config or CRAIL_CONFIG"
    )
