"""Every error that crosses a process boundary: one row each, used by both ends, FUSE and Java.

``wire_code`` is what a reply frame carries in its status field; 0 is success. ``errno`` is what a
system call on the mount returns. ``retryable`` says whether the same request may succeed when it
is sent again later without anybody changing anything else.
"""

from __future__ import annotations

import errno as _errno
from typing import ClassVar


class CrailError(Exception):
    """Base of all. The message says what happened, to what, and what to do about it."""

    wire_code: ClassVar[int] = 1
    errno: ClassVar[int] = _errno.EIO
    retryable: ClassVar[bool] = False

    @property
    def message(self) -> str:
        return str(self.args[0]) if self.args else type(self).__name__


class InternalError(CrailError):
    """The server met a state that it holds impossible; its log has the trace."""

    wire_code = 2


class NotFoundError(CrailError):
    wire_code = 3
    errno = _errno.ENOENT


class ExistsError(CrailError):
    wire_code = 4
    errno = _errno.EEXIST


class NotADirectoryCrailError(CrailError):
    wire_code = 5
    errno = _errno.ENOTDIR


class IsADirectoryCrailError(CrailError):
    wire_code = 6
    errno = _errno.EISDIR


class NotEmptyError(CrailError):
    wire_code = 7
    errno = _errno.ENOTEMPTY


class InvalidError(CrailError):
    """An argument that no state of the system could accept."""

    wire_code = 8
    errno = _errno.EINVAL


class NameTooLongError(CrailError):
    wire_code = 9
    errno = _errno.ENAMETOOLONG


class NotPermittedError(CrailError):
    """The operation is not allowed on this kind of node, whoever asks."""

    wire_code = 10
    errno = _errno.EPERM


class AccessDeniedError(CrailError):
    wire_code = 11
    errno = _errno.EACCES


class NoSpaceError(CrailError):
    """Every tier that the node's storage class names is full."""

    wire_code = 12
    errno = _errno.ENOSPC


class TooManyLinksError(CrailError):
    wire_code = 13
    errno = _errno.EMLINK


class TooLargeError(CrailError):
    wire_code = 14
    errno = _errno.EFBIG


class NoAttributeError(CrailError):
    wire_code = 15
    errno = _errno.ENODATA


class AttributeSpaceError(CrailError):
    """A value too large for an extended attribute, or too many of them on one node."""

    wire_code = 16
    errno = _errno.E2BIG


class NotSupportedError(CrailError):
    wire_code = 17
    errno = _errno.EOPNOTSUPP


class CrossDeviceError(CrailError):
    wire_code = 18
    errno = _errno.EXDEV


class StaleError(CrailError):
    """The node was removed by somebody else while this client had only its number."""

    wire_code = 19
    errno = _errno.ESTALE


class ConflictError(CrailError):
    """Another client committed one of these blocks in between: merge and commit again."""

    wire_code = 20
    retryable = True


class ChecksumError(CrailError):
    """A block's bytes are not those that were written, and there is no good replica."""

    wire_code = 21


class BlockLostError(CrailError):
    """The region that held the block is gone."""

    wire_code = 22


class UnavailableError(CrailError):
    """No server answered within the stated deadline."""

    wire_code = 23
    retryable = True


class TryAgainError(CrailError):
    """The server cannot do it just now: it starts, waits for clients to return, or reclaims."""

    wire_code = 24
    retryable = True
    errno = _errno.EAGAIN


class FencedError(CrailError):
    """This client's session or grant has ended; what it had not committed is lost."""

    wire_code = 25


class ProtocolError(CrailError):
    """Bytes that are not a message of this protocol; the connection is closed."""

    wire_code = 26
    errno = _errno.EPROTO


class AuthenticationError(CrailError):
    """The peer does not know the cluster's secret, or belongs to another cluster."""

    wire_code = 27
    errno = _errno.EACCES


class VersionError(CrailError):
    """The peer speaks another version of the protocol."""

    wire_code = 28
    errno = _errno.EPROTO


class DamagedError(CrailError):
    """Stored state that fails its check: refused, never served as good."""

    wire_code = 29


class ConfigurationError(CrailError):
    """A setting that cannot be used; names the file, the key and what was expected."""

    wire_code = 30
    errno = _errno.EINVAL


class BusyError(CrailError):
    """Somebody else has it: a mount point, a state directory, a device."""

    wire_code = 31
    errno = _errno.EBUSY


ERRORS_BY_CODE: dict[int, type[CrailError]] = {CrailError.wire_code: CrailError} | {
    kind.wire_code: kind for kind in CrailError.__subclasses__()
}
assert len(ERRORS_BY_CODE) == len(CrailError.__subclasses__()) + 1, "two errors share a wire code"


def error_from_wire(code: int, message: str) -> CrailError:
    """The error that a peer reported; an unknown code is a plain ``CrailError`` that names it."""
    kind = ERRORS_BY_CODE.get(code)
    if kind is None:
        return CrailError(f"peer reported unknown error {code}: {message}")
    return kind(message)
