"""Errors that name the path on the command line, not the inode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from crailfs.errors import (
    CrailError,
    ExistsError,
    IsADirectoryCrailError,
    NotADirectoryCrailError,
    NotEmptyError,
    NotFoundError,
)

_TEXTS: dict[type[CrailError], str] = {
    NotFoundError: "no such file or directory",
    NotADirectoryCrailError: "it, or a part of it, is not a directory",
    IsADirectoryCrailError: "is a directory",
    ExistsError: "exists already",
    NotEmptyError: "is not empty",
}


@contextmanager
def about(path: str) -> Iterator[None]:
    """What the block raises about a name speaks of ``path``; other errors pass unchanged."""
    try:
        yield
    except tuple(_TEXTS) as error:
        raise type(error)(f"{path}: {_TEXTS[type(error)]}") from error
