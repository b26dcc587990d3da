"""How fast the mover goes, and for whom it waits; on a clock that jumps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable

import pytest
import trio
from trio.testing import MockClock

from crailfs.config import ClientConfig, Credentials
from crailfs.net.client import RpcClient
from crailfs.units import MIB
from crailfs.wire.messages import Role
from storage_server.mover import PAUSE_MAX_S, QUIET_S, Mover

CREDENTIALS = Credentials(cluster_id=b"", secret=b"a secret of the tests")


class Foreground:
    """Clients of the storage server: ``busy`` or not."""

    def __init__(self) -> None:
        self.busy = False
        self._served = 0

    def requests_served(self) -> int:
        self._served += self.busy
        return self._served


def virtual_seconds(
    foreground: Foreground, work: Callable[[Mover], Awaitable[None]], rate: int
) -> float:
    async def main() -> float:
        mover = Mover(
            RpcClient("unix:/nowhere", CREDENTIALS, role=Role.STORAGE_SERVER, client_id=1),
            b"s" * 16,
            ClientConfig(metadata="unix:/nowhere", credentials=CREDENTIALS),
            bytes_per_second=rate,
            requests_served=foreground.requests_served,
            counters=Counter(),
        )
        began_s = trio.current_time()
        await work(mover)
        return trio.current_time() - began_s

    return trio.run(main, clock=MockClock(autojump_threshold=0))


@pytest.mark.parametrize("urgent", [False, True])
def test_the_rate_is_kept(urgent: bool) -> None:
    async def ten_pieces(mover: Mover) -> None:
        for _ in range(10):
            await mover._pace(urgent, MIB)

    assert virtual_seconds(Foreground(), ten_pieces, 4 * MIB) == pytest.approx(9 / 4)


def test_a_busy_server_is_waited_for_but_not_for_ever() -> None:
    foreground = Foreground()
    foreground.busy = True

    async def one_piece(mover: Mover) -> None:
        await mover._pace(False, MIB)

    elapsed_s = virtual_seconds(foreground, one_piece, 1 << 40)
    assert PAUSE_MAX_S <= elapsed_s < PAUSE_MAX_S + 2 * QUIET_S


def test_it_goes_on_as_soon_as_the_server_is_idle() -> None:
    foreground = Foreground()
    foreground.busy = True

    async def one_piece(mover: Mover) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(mover._pace, False, MIB)
            await trio.sleep(PAUSE_MAX_S / 2)
            foreground.busy = False

    elapsed_s = virtual_seconds(foreground, one_piece, 1 << 40)
    assert elapsed_s < PAUSE_MAX_S / 2 + 3 * QUIET_S


def test_a_nearly_full_tier_does_not_wait() -> None:
    foreground = Foreground()
    foreground.busy = True

    async def one_piece(mover: Mover) -> None:
        await mover._pace(True, MIB)

    assert virtual_seconds(foreground, one_piece, 1 << 40) == 0.0
