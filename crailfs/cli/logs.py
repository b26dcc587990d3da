"""Logging to stderr."""

from __future__ import annotations

import logging
import os
import sys

from crailfs.errors import ConfigurationError


def set_up_logging(default_level: str) -> None:
    """From ``CRAIL_LOG_LEVEL`` on, else from ``default_level``. May be called again."""
    level_name = os.environ.get("CRAIL_LOG_LEVEL", default_level)
    levels = logging.getLevelNamesMapping()
    if level_name.upper() not in levels:
        raise ConfigurationError(
            f"environment: CRAIL_LOG_LEVEL: expected debug, info, warning or error, found "
            f"{level_name!r}"
        )
    logging.basicConfig(
        stream=sys.stderr,
        level=levels[level_name.upper()],
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        force=True,
    )
