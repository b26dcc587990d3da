"""The metadata server: a driver, a listening port, and what has to happen as time goes by."""

from __future__ import annotations

import logging

import trio

from crailfs.config import Credentials, MetadataConfig
from crailfs.errors import CrailError
from crailfs.limits import JOURNAL_SYNC_INTERVAL_MS
from crailfs.net import server as rpc
from metadata_server.driver import Driver
from metadata_server.handler import (
    DEFAULT_TIMINGS,
    OPERATIONS_SERVED,
    MetadataHandler,
    Timings,
    WaterMarks,
)

__all__ = ["Timings", "serve"]

log = logging.getLogger(__name__)

_TICKS_PER_LEASE = 20
_EXPIRY_BUSY_S = 0.02
_EXPIRY_IDLE_S = 0.5


async def serve(
    config: MetadataConfig,
    *,
    timings: Timings = DEFAULT_TIMINGS,
    task_status: trio.TaskStatus[list[str]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until cancelled, then close the state cleanly; started with the bound addresses.

    Raises ``DamagedError``, ``ConfigurationError`` or ``BusyError`` if the state directory or an
    address cannot be used. OSError: the journal can no longer be written; what was acknowledged is
    safe, and the next start goes on from there.
    """
    driver = Driver.open(config)
    try:
        water_marks = WaterMarks(config.tier_high_water, config.tier_low_water)
        handler = MetadataHandler(driver, timings, water_marks=water_marks)
        credentials = Credentials(cluster_id=driver.cluster_id, secret=config.credentials.secret)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_keep_durable, driver, handler)
            nursery.start_soon(_tick, handler, timings)
            nursery.start_soon(_expire_nodes, handler)
            await rpc.serve(
                config.listen,
                handler,
                credentials,
                epoch=driver.epoch,
                operations=OPERATIONS_SERVED,
                task_status=task_status,
            )
    finally:
        driver.close()


async def _tick(handler: MetadataHandler, timings: Timings) -> None:
    while True:
        await trio.sleep(timings.lease_ms / 1000 / _TICKS_PER_LEASE)
        try:
            handler.tick()
        except CrailError:
            log.exception("what is due by time could not be done; trying again")


async def _expire_nodes(handler: MetadataHandler) -> None:
    """In steps of a few milliseconds, most of the time asleep."""
    problem = ""
    while True:
        more = False
        try:
            more = handler.expire_nodes()
        except CrailError as error:
            if error.message != problem:
                log.error("nothing whose time to live is over is removed: %s", error.message)
            problem = error.message
        else:
            problem = ""
        await trio.sleep(_EXPIRY_BUSY_S if more else _EXPIRY_IDLE_S)


async def _keep_durable(driver: Driver, handler: MetadataHandler) -> None:
    """Sync the journal once an interval, and at once for whoever waits for it: one sync serves all
    who began to wait before it. Checkpoint when it is due."""
    wanted = trio.Event()
    handler.sync_wanted = wanted.set
    while True:
        with trio.move_on_after(JOURNAL_SYNC_INTERVAL_MS / 1000):
            await wanted.wait()
        wanted = trio.Event()
        handler.sync_wanted = wanted.set
        waiters = handler.take_sync_waiters()
        driver.write_batch()
        next_header_change = driver.next_header_change
        if driver.sync_due:
            await trio.to_thread.run_sync(driver.sync_journal)
        driver.synced_header_changes = next_header_change
        try:
            driver.free_settled()
        except CrailError:
            log.exception("what left files could not be freed; trying again")
        for answer in waiters:
            answer()
        handler.batch_done()
        if driver.checkpoint_due:
            driver.checkpoint()
