"""What may stand in a directory entry."""

from __future__ import annotations

from crailfs.errors import InvalidError, NameTooLongError
from crailfs.limits import NAME_MAX_BYTES


def check_name(name: bytes) -> None:
    """Raise InvalidError or NameTooLongError unless ``name`` can be a directory entry."""
    if len(name) > NAME_MAX_BYTES:
        raise NameTooLongError(
            f"name of {len(name)} bytes ({name[:32]!r}...): at most {NAME_MAX_BYTES} are possible"
        )
    if not name or b"/" in name or b"\0" in name or name in (b".", b".."):
        raise InvalidError(
            f"{name!r} cannot name a directory entry: a name is not empty, not '.' or '..', and "
            f"has neither '/' nor NUL"
        )
