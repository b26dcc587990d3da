"""pyverbs, imported when it is first needed: it comes with the distribution, not from a registry,
because it has to match the distribution's libibverbs."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from crailfs.errors import UnavailableError


class Verbs(NamedTuple):
    """pyverbs' modules; it has no type information."""

    cq: Any
    device: Any
    addr: Any
    enums: Any
    mr: Any
    pd: Any
    qp: Any
    wr: Any
    error: type[Exception]


@functools.cache
def load() -> Verbs:
    """Raises ``UnavailableError`` if pyverbs or libibverbs is missing."""
    names = ("cq", "device", "addr", "enums", "mr", "pd", "qp", "wr")
    try:
        modules: list[Any] = [importlib.import_module(f"pyverbs.{name}") for name in names]
        modules.append(importlib.import_module("pyverbs.pyverbs_error").PyverbsError)
    except ImportError as missing:
        raise UnavailableError(
            f"python3-pyverbs is not installed for this Python ({missing})"
        ) from missing
    return Verbs(*modules)


@contextlib.contextmanager
def plain_errors(action: str) -> Iterator[None]:
    """What pyverbs raises in here becomes ``UnavailableError``."""
    try:
        yield
    except load().error as error:
        raise UnavailableError(f"{action}: {error}") from error
