"""Which file system is meant: one that ``crail up`` runs on this host, or a configured cluster."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from crailfs.config import ClientConfig
from crailfs.config_file import Settings, find_file
from crailfs.embedded import registry
from crailfs.embedded.state import State
from crailfs.errors import ConfigurationError, UnavailableError


class Target(NamedTuple):
    settings: Settings
    state: State | None
    """Of an embedded file system that runs on this host."""
    mountpoint: Path | None
    """Where that one is mounted."""


def find_target(
    *,
    at: str | os.PathLike[str] | None = None,
    config: str | None = None,
    overrides: Sequence[str] = (),
) -> Target:
    """The file system that ``crail up`` mounted ``at``; else the one that ``config`` names (or
    ``CRAIL_CONFIG``, or the system's ``crail.toml``, or ``CRAIL_CLUSTER_METADATA``); else the only
    embedded one that runs here. ``overrides`` are ``section.key=value``.

    Raises:
        ConfigurationError: several run here, or a setting is wrong.
        UnavailableError: none is named and none runs, or the one named by ``at`` does not.
    """
    if at is not None:
        mountpoint = registry.absolute(Path(at))
        return _embedded(mountpoint, registry.running_state_at(mountpoint), overrides)
    file = find_file(config)
    settings = Settings.load(file, overrides)
    if file is not None or settings.is_set("cluster", "metadata"):
        return Target(settings, None, None)
    running = registry.running_states()
    if len(running) == 1:
        return _embedded(*running[0], overrides)
    if running:
        points = ", ".join(str(mountpoint) for mountpoint, _ in running)
        raise ConfigurationError(f"several file systems run here ({points}): name one with --at")
    raise UnavailableError(
        "no file system is named and none runs here: start one with `crail up MOUNTPOINT`, or name "
        "a configuration file with --config or CRAIL_CONFIG"
    )


def client_config(
    *, at: str | os.PathLike[str] | None = None, config: str | None = None
) -> ClientConfig:
    """For ``CrailStore.connect`` and ``BlockingStore``: see ``find_target``, also for errors."""
    return find_target(at=at, config=config).settings.client()


def _embedded(mountpoint: Path, state: State, overrides: Sequence[str]) -> Target:
    # The environment's settings are of other file systems: this one was named.
    settings = Settings.load(state.config_file, overrides, environment={})
    return Target(settings, state, mountpoint)
