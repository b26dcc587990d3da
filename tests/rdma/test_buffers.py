"""Registered buffers: whose they are, and when they come back. Registering is the device's: here it
is counted."""

from __future__ import annotations

import ctypes
import itertools
import threading

from crailfs.rdma.buffers import KEPT_MAX_BYTES, KEPT_SIZE_MAX_BYTES, BufferPool, Registration
from crailfs.units import KIB, MIB


def new_pool() -> BufferPool:
    keys = itertools.count(1)
    return BufferPool(lambda address, byte_count: Registration(next(keys), object()))


def test_a_buffer_comes_back_with_the_last_view_of_a_part_of_it() -> None:
    pool = new_pool()
    lease = pool.take(100 * KIB)
    key = lease.key
    part = memoryview(lease.view)[5:10].toreadonly()
    del lease
    assert pool.take(100 * KIB).key != key, "somebody still looks at it"
    del part
    taken = [pool.take(100 * KIB).key, pool.take(100 * KIB).key]
    assert key in taken
    assert pool.registrations == 2


def test_the_address_is_the_view_s() -> None:
    pool = new_pool()
    lease = pool.take(100_000)
    lease.view[3:6] = b"abc"
    assert ctypes.string_at(lease.address + 3, 3) == b"abc"
    assert len(lease.view) == 100_000


def test_finds_its_own_memory_and_no_other() -> None:
    pool, other = new_pool(), new_pool()
    lease = pool.take(MIB)
    found = pool.find(lease.view[64 * KIB : 128 * KIB])
    assert found is not None
    assert (found.address, found.key) == (lease.address + 64 * KIB, lease.key)
    assert len(found.view) == 64 * KIB
    assert other.find(lease.view) is None, "another device cannot read it"
    assert pool.find(b"bytes") is None
    assert pool.find(bytearray(10)) is None


def test_what_is_kept_is_bounded() -> None:
    pool = new_pool()
    count = KEPT_MAX_BYTES // KEPT_SIZE_MAX_BYTES + 3
    leases = [pool.take(KEPT_SIZE_MAX_BYTES) for _ in range(count)]
    assert pool.registrations == count
    leases.clear()
    pool.take(1)
    assert pool.free_bytes == KEPT_MAX_BYTES
    larger = pool.take(KEPT_SIZE_MAX_BYTES + 1)
    del larger
    pool.take(1)
    assert pool.free_bytes <= KEPT_MAX_BYTES, "larger ones are not kept at all"


def test_a_last_view_may_be_dropped_in_any_thread() -> None:
    pool = new_pool()
    views = [pool.take(64 * KIB).view for _ in range(64)]

    def drop() -> None:
        while views:
            try:
                views.pop()
            except IndexError:
                return

    threads = [threading.Thread(target=drop) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    again = [pool.take(64 * KIB) for _ in range(64)]
    assert len({lease.address for lease in again}) == 64
    assert pool.registrations == 64
