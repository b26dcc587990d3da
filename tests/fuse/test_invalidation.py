"""The kernel's caches: what is waited for before another client's change is acknowledged."""

from __future__ import annotations

import threading

import pyfuse3
import pytest
import trio
import trio.testing

from crailfs.wire.messages import Invalidation
from fuse_client.invalidation import DirectoryChanges, KernelInvalidator

DIRECTORY, FILE = 5, 6


class Kernel:
    """Notes what it is told to forget; ``unlocked`` says whether the directory's lock is free."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.forgotten: list[object] = []
        self.unlocked = threading.Event()
        self.unlocked.set()
        monkeypatch.setattr(pyfuse3, "invalidate_inode", self.forgotten.append)
        monkeypatch.setattr(pyfuse3, "invalidate_entry", self.forget_entry)

    def forget_entry(self, parent: int, name: bytes) -> None:
        assert self.unlocked.wait(10)
        if name == b"unknown":
            raise FileNotFoundError
        self.forgotten.append((parent, name))


async def test_nodes_and_names_are_forgotten_before_it_returns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernel = Kernel(monkeypatch)
    async with trio.open_nursery() as nursery:
        await KernelInvalidator(nursery, DirectoryChanges()).invalidate(
            (
                Invalidation(DIRECTORY, b"unknown", False),
                Invalidation(DIRECTORY, b"name", False),
                Invalidation(FILE, b"", False),
            )
        )
        assert set(kernel.forgotten) == {FILE, (DIRECTORY, b"name")}


@pytest.mark.parametrize("change_begins", ["before", "while waiting"])
async def test_a_directory_locked_by_our_own_change_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, change_begins: str
) -> None:
    kernel = Kernel(monkeypatch)
    changes = DirectoryChanges()
    async with trio.open_nursery() as nursery:
        invalidator = KernelInvalidator(nursery, changes)
        kernel.unlocked.clear()
        with trio.fail_after(5):
            if change_begins == "before":
                with changes.changing(DIRECTORY):
                    await invalidator.invalidate((Invalidation(DIRECTORY, b"name", False),))
            else:
                async with trio.open_nursery() as waiting:
                    waiting.start_soon(
                        invalidator.invalidate, (Invalidation(DIRECTORY, b"name", False),)
                    )
                    await trio.testing.wait_all_tasks_blocked()
                    with changes.changing(DIRECTORY):
                        pass
        assert kernel.forgotten == []
        kernel.unlocked.set()
    # It has been carried out as soon as the kernel let go of the directory.
    assert kernel.forgotten == [(DIRECTORY, b"name")]


async def test_a_change_elsewhere_does_not_end_the_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernel = Kernel(monkeypatch)
    changes = DirectoryChanges()
    async with trio.open_nursery() as nursery:
        invalidator = KernelInvalidator(nursery, changes)
        kernel.unlocked.clear()
        done = trio.Event()

        async def wait() -> None:
            await invalidator.invalidate((Invalidation(DIRECTORY, b"name", False),))
            done.set()

        nursery.start_soon(wait)
        with changes.changing(DIRECTORY + 1):
            await trio.testing.wait_all_tasks_blocked()
        assert not done.is_set()
        kernel.unlocked.set()
        with trio.fail_after(5):
            await done.wait()
    assert kernel.forgotten == [(DIRECTORY, b"name")]
