"""How nodes are shown."""

from __future__ import annotations

import stat
import time
from typing import TYPE_CHECKING

from crailfs.records import NodeKind
from crailfs.units import NANOSECONDS_PER_SECOND

if TYPE_CHECKING:
    from crailfs.records import Attributes

_MARKS = {
    NodeKind.DIRECTORY: "/",
    NodeKind.MULTIFILE: "/",
    NodeKind.TABLE: "/",
    NodeKind.SYMLINK: "@",
    NodeKind.FIFO: "|",
    NodeKind.SOCKET: "=",
}


def printable(name: bytes) -> str:
    """One line, whatever the name is made of."""
    text = name.decode(errors="backslashreplace")
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in text
    )


def marked(name: str, node: Attributes) -> str:
    return name + _MARKS.get(node.kind, "")


def long_line(name: str, node: Attributes) -> str:
    """As ``ls -l``, with the storage class."""
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(node.mtime_ns // NANOSECONDS_PER_SECOND))
    target = f" -> {printable(node.target)}" if node.kind is NodeKind.SYMLINK else ""
    return (
        f"{stat.filemode(node.st_mode)} {node.nlink:>3} {node.uid:>5} {node.gid:>5} "
        f"{node.size:>12} {when} {node.placement.storage_class!s:<11} {name}{target}"
    )
