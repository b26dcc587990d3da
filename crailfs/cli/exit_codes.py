"""What ``crail`` tells the shell. These numbers are stable: scripts rely on them."""

from __future__ import annotations

import enum

from crailfs import errors


class ExitCode(enum.IntEnum):
    OK = 0
    FAILED = 1
    """The operation was tried and failed."""
    USAGE = 2
    """Wrong command line or configuration; nothing was tried."""
    UNREACHABLE = 3
    """Not running, or no server answered in time."""
    BUSY = 4
    """Somebody else has it: a mount point, a state directory, a mount in use."""
    REFUSED = 5
    """The server refused us: wrong secret, another cluster, another protocol version."""
    DAMAGED = 6
    """Stored state or data fails its check."""
    INTERRUPTED = 130


_BY_ERROR: dict[type[errors.CrailError], ExitCode] = {
    errors.ConfigurationError: ExitCode.USAGE,
    errors.UnavailableError: ExitCode.UNREACHABLE,
    errors.TryAgainError: ExitCode.UNREACHABLE,
    errors.BusyError: ExitCode.BUSY,
    errors.AuthenticationError: ExitCode.REFUSED,
    errors.VersionError: ExitCode.REFUSED,
    errors.DamagedError: ExitCode.DAMAGED,
    errors.ChecksumError: ExitCode.DAMAGED,
    errors.BlockLostError: ExitCode.DAMAGED,
}


class ReportedError(errors.CrailError):
    """What another process of ours reported, with the exit code that it gave."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = ExitCode(exit_code)


def exit_code_of(error: errors.CrailError) -> ExitCode:
    if isinstance(error, ReportedError):
        return error.exit_code
    return _BY_ERROR.get(type(error), ExitCode.FAILED)
