"""Completions of work requests, as something that an event loop can wait for.

pyverbs' ``CompChannel`` does not show its descriptor, and its ``get_cq_event`` sleeps with the
interpreter's lock held. So the descriptor is found where it comes into being: it is the one
``[infinibandevent]`` that ``/proc/self/fd`` has after the channel was made and had not before. It
is set to not block and waited for as any other; then ``get_cq_event`` has an event and returns at
once. The queue is armed again before it is polled, so that no completion falls in between.
"""

from __future__ import annotations

import errno
import os
import threading
from typing import Any, Final

from crailfs.errors import InternalError
from crailfs.rdma.device import Device
from crailfs.rdma.verbs import plain_errors

POLL_MAX: Final = 64
"""Completions taken in one call."""

_making_channel: Final = threading.Lock()


class CompletionQueue:
    """``fd`` is readable when there is something to ``poll`` after an ``acknowledge``."""

    def __init__(self, device: Device, depth: int) -> None:
        """Raises ``UnavailableError``."""
        self._errors = device.verbs.error
        with plain_errors("making a completion queue"), _making_channel:
            before = _event_descriptors()
            self._channel: Any = device.verbs.cq.CompChannel(device.context)
            made = _event_descriptors() - before
            if len(made) != 1:
                raise InternalError(f"a completion channel made {len(made)} descriptors, not one")
            (self.fd,) = made
            os.set_blocking(self.fd, False)
            self.queue: Any = device.verbs.cq.CQ(device.context, depth, None, self._channel, 0)
            self.queue.req_notify()

    def acknowledge(self) -> None:
        """Take the notification, if there is one, and ask for the next."""
        try:
            self._channel.get_cq_event(self.queue)
        except self._errors as error:
            if getattr(error, "error_code", 0) != errno.EAGAIN:
                raise
        else:
            self.queue.ack_events(1)
        self.queue.req_notify()

    def poll(self) -> list[Any]:
        """Completions (``ibv_wc``) in order; fewer than ``POLL_MAX``: there are no more."""
        completions: list[Any] = self.queue.poll(POLL_MAX)[1]
        return completions

    def close(self) -> None:
        """After its queue pairs. May be called again."""
        self.queue.close()
        self._channel.close()


def _event_descriptors() -> set[int]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}") == "anon_inode:[infinibandevent]":
                found.add(int(name))
        except FileNotFoundError:
            continue  # the listing's own
    return found
