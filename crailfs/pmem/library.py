"""Loading a C library of the Persistent Memory Development Kit."""

from __future__ import annotations

import ctypes
import logging
import os
from typing import Final

from crailfs.errors import NotSupportedError

log = logging.getLogger(__name__)

OVERRIDES: Final = (
    "PMEM_IS_PMEM_FORCE",
    "PMEM_NO_FLUSH",
    "PMEMOBJ_CONF",
    "PMEMOBJ_CONF_FILE",
)
"""Environment variables with which the libraries take any memory for persistent, leave out flushes
or map a pool privately: with them, what is called durable would not be. They are read while a
library is loaded."""


class Library:
    """A shared library that is loaded at its first use. Calls release the interpreter's lock."""

    def __init__(self, file_name: str, debian_package: str) -> None:
        self._file_name = file_name
        self._debian_package = debian_package
        self._loaded: ctypes.CDLL | None = None

    def missing(self) -> str | None:
        """Why the library cannot be used, and what to do; None: it can."""
        try:
            self.load()
        except NotSupportedError as error:
            return str(error)
        return None

    def load(self) -> ctypes.CDLL:
        """Raises ``NotSupportedError`` if the host does not have it."""
        if self._loaded is None:
            for name in OVERRIDES:
                if os.environ.pop(name, None) is not None:
                    log.warning("%s is ignored: it could make durable what is not", name)
            try:
                self._loaded = ctypes.CDLL(self._file_name, use_errno=True)
            except OSError as error:
                raise NotSupportedError(
                    f"{self._file_name} cannot be loaded ({error}): install the Debian package "
                    f"{self._debian_package}"
                ) from error
        return self._loaded
