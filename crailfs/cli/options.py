"""Options that several subcommands share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from crailfs.config_file import Settings, find_file
from crailfs.errors import ConfigurationError, UnavailableError

if TYPE_CHECKING:
    from crailfs.embedded.state import State


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


class Target(NamedTuple):
    """The file system that a command line means."""

    settings: Settings
    state: State | None
    """Of an embedded one that runs on this host."""
    mountpoint: Path | None
    """Where that one is mounted."""


def target_of(options: argparse.Namespace) -> Target:
    """
    Raises:
        ConfigurationError: none is named, and not exactly one embedded file system runs.
        UnavailableError: the one that ``--at`` names does not run.
    """
    from crailfs.embedded import registry

    if options.at is not None:
        mountpoint = registry.absolute(Path(options.at))
        return _embedded(mountpoint, registry.running_state_at(mountpoint), options.overrides)
    file = find_file(options.config)
    settings = Settings.load(file, options.overrides)
    if file is not None or settings.is_set("cluster", "metadata"):
        return Target(settings, None, None)
    running = registry.running_states()
    if len(running) == 1:
        return _embedded(*running[0], options.overrides)
    if running:
        points = ", ".join(str(mountpoint) for mountpoint, _ in running)
        raise ConfigurationError(f"several file systems run here ({points}): name one with --at")
    raise UnavailableError(
        "no file system is named and none runs here: start one with `crail up MOUNTPOINT`, or name "
        "a configuration file with --config or CRAIL_CONFIG"
    )


def _embedded(mountpoint: Path, state: State, overrides: list[str]) -> Target:
    # The environment's settings are of other file systems: this one was named.
    settings = Settings.load(state.config_file, overrides, environment={})
    return Target(settings, state, mountpoint)
