"""A nursery for what a client does in the background."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio


@asynccontextmanager
async def background_nursery() -> AsyncIterator[trio.Nursery]:
    """A nursery for background tasks, which live until the body has ended, even if the body is
    cancelled: what is open is committed through them. What is raised comes out as it is, not in a
    group."""

    async def hold(*, task_status: trio.TaskStatus[trio.Nursery]) -> None:
        with trio.CancelScope(shield=True):
            async with trio.open_nursery() as background:
                task_status.started(background)
                await trio.sleep_forever()

    try:
        async with trio.open_nursery() as nursery:
            background = await nursery.start(hold)
            try:
                yield background
            finally:
                background.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        raised: BaseException = group
        while isinstance(raised, BaseExceptionGroup) and len(raised.exceptions) == 1:
            raised = raised.exceptions[0]
        if raised is group:
            raise
        raise raised from None
