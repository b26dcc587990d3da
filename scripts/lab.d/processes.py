"""Nothing that the lab starts outlives it, however it ends."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def dies_with_us() -> Callable[[], None]:
    """For ``preexec_fn``: the kernel kills the new process when the thread that started it ends.

    So start processes from the main thread only.
    """
    parent = os.getpid()

    def prepare() -> None:
        asked = _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) == 0
        # The parent may have died before the kernel was asked.
        if not asked or os.getppid() != parent:
            os._exit(126)

    return prepare
