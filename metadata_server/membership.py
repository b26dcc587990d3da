"""Which storage servers are alive."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

from msgspec.structs import replace

from crailfs.wire.messages import ClusterMap
from metadata_server import schema
from metadata_server.context import Context
from metadata_server.driver import Driver
from metadata_server.txn import Txn

log = logging.getLogger(__name__)


class Membership:
    """When each storage server was last heard of; one that is silent for too long is marked dead,
    and nothing is granted in its regions until it registers again."""

    def __init__(self, driver: Driver, *, timeout_s: float, clock_s: Callable[[], float]) -> None:
        self._driver = driver
        self._timeout_s = timeout_s
        self._clock_s = clock_s
        now_s = clock_s()
        self._heard_s = dict.fromkeys(driver.run(_live_servers), now_s)
        """Of the servers that are alive."""

    def heard(self, server_id: bytes) -> None:
        self._heard_s[server_id] = self._clock_s()

    def excuse_silence(self) -> None:
        """Nobody could be heard: count from now."""
        self._heard_s = dict.fromkeys(self._heard_s, self._clock_s())

    def expire(self) -> None:
        """Mark dead who has been silent for too long."""
        now_s = self._clock_s()
        for server_id, heard_s in list(self._heard_s.items()):
            if now_s - heard_s > self._timeout_s:
                del self._heard_s[server_id]
                self._driver.run(partial(_mark_dead, server_id))
                log.warning(
                    "storage server %s has been silent for %.1f s: nothing is granted there until "
                    "it is back",
                    server_id.hex(),
                    now_s - heard_s,
                )

    def with_silence(self, cluster: ClusterMap) -> ClusterMap:
        """The map with how long ago each server was heard of."""
        now_s = self._clock_s()
        servers = tuple(
            replace(server, seconds_since_heard=now_s - self._heard_s[server.id])
            if server.id in self._heard_s
            else server
            for server in cluster.servers
        )
        return replace(cluster, servers=servers)


def _live_servers(txn: Txn, context: Context) -> list[bytes]:
    servers = [schema.decode_server(value).info for _, value in txn.scan(schema.SERVERS)]
    return [server.id for server in servers if server.alive]


def _mark_dead(server_id: bytes, txn: Txn, context: Context) -> None:
    value = txn.get(schema.SERVERS, server_id)
    if value is not None:
        stored = schema.decode_server(value)
        dead = replace(stored, info=replace(stored.info, alive=False))
        txn.put(schema.SERVERS, server_id, schema.encode(dead))
