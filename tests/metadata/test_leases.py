"""Leases: who is remembered for how long."""

from __future__ import annotations

from metadata_server.leases import Leases


def test_others_hold_what_they_were_shown() -> None:
    leases = Leases()
    leases.show(1, [10, 11])
    leases.show(2, [10])
    assert leases.holders(10, 1) == {2}
    assert leases.holders(10, 3) == {1, 2}
    assert leases.holders(11, 1) == frozenset()
    assert leases.holders(12, 3) == frozenset()


def test_a_lease_outlives_one_rotation_and_not_two() -> None:
    leases = Leases()
    leases.show(1, [10])
    leases.rotate()
    assert leases.holders(10, 2) == {1}
    leases.rotate()
    assert leases.holders(10, 2) == frozenset()


def test_a_renewed_lease_lives_on() -> None:
    leases = Leases()
    leases.show(1, [10])
    for _ in range(5):
        leases.rotate()
        leases.show(1, [10])
    assert leases.holders(10, 2) == {1}


def test_an_ended_client_holds_nothing_and_its_slot_is_not_inherited_with_its_leases() -> None:
    leases = Leases()
    leases.show(1, [10])
    leases.end(1)
    assert leases.holders(10, 9) == frozenset()
    for newcomer in range(2, 6):
        leases.show(newcomer, [newcomer])
        assert leases.holders(10, 9) == frozenset()
        leases.rotate()


def test_slots_are_used_again() -> None:
    leases = Leases()
    for client_id in range(1, 1_000):
        leases.show(client_id, [5])
        leases.end(client_id)
        leases.rotate()
    leases.show(7, [5])
    assert leases.holders(5, 0) == {7}
    assert max(leases._bits.values()).bit_length() <= 4


def test_beyond_the_limit_a_client_is_taken_to_hold_everything() -> None:
    leases = Leases(inodes_max=10)
    leases.show(1, range(100))
    assert leases.inode_count == 10
    assert leases.holders(99, 2) == {1}
    assert leases.holders(12345, 2) == {1}
    leases.rotate()
    leases.rotate()
    assert leases.holders(99, 2) == frozenset()
