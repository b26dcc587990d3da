"""What the running server knows of a client with a session; the rest is in the session's row."""

from __future__ import annotations

from dataclasses import dataclass

from crailfs.net.server import Peer


@dataclass(slots=True, eq=False)
class Client:
    id: int
    peer: Peer | None = None
    """None: it is away, and may come back until its session expires."""
    is_local: bool = False
    """Whether it is, or was last, connected by a Unix socket."""
    was_active: bool = False
    """Whether a request has come since ``heard_s`` was last brought up to date."""
    heard_s: float = 0.0

    @property
    def forgets_at_once(self) -> bool:
        """Whether, being away, it trusts nothing any more: the end of a Unix socket's connection
        is seen by both sides at the same time."""
        return self.peer is None and self.is_local
