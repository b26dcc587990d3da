"""Checks what a power cut has left, then puts load on it for the next one.

    python -m tests.lab.power.cluster SEED
    sh tests/lab/power/load.sh

In one process: a metadata server, a storage server with a region of persistent memory and one on an
NVMe disk, and clients that write, overwrite, sync, cut, rename and remove files. What was promised
is noted in ``CRAIL_LAB_OUT``, which is on the lab's host. After a cut:

- both regions open, and every block that their own headers say is some file's has the bytes of its
  checksum;
- the files of each client are as they were after one of its steps: not before the last that was
  acknowledged as durable, and with every byte. Only blocks on the NVMe disk that nobody had synced
  may be unreadable, which is an error and never other bytes;
- the audit finds nothing, no block is in two extents, and headers and extents say the same;
- the files of the round before, which were then checked and synced, are still there as they were.

Starting takes an emulated guest longer than all of that. So the process stays when it has verified,
and the second command, which shows what it writes, lets it begin with its load.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import trio

import metadata_server.server
import storage_server.server
from crailfs.client.store import CrailStore
from crailfs.config import ClientConfig
from crailfs.limits import BLOCK_SIZE_DEFAULT_BYTES
from tests.lab.power.devices import Devices, prepare
from tests.lab.power.notes import Notes, Settled
from tests.support.history import File, History, Step, settle
from tests.support.history_load import make_directories, observe, perform
from tests.support.region_audit import check_headers, check_ownership, open_offline

CLASSES = {"pmem": "pmem", "nvme": "nvme"}
TRANSPORTS = (("local", "tcp"), ("tcp",))
"""Of each client of the load."""
LOG = Path("/run/power.log")
PID = Path("/run/power.pid")
GO = Path("/run/power.go")
"""A pipe: the load begins when it has been written to and closed."""
TIMINGS = metadata_server.server.Timings(lease_ms=1_000)
"""For so long the clients of before the cut are waited for."""


def main() -> None:
    began = time.monotonic()
    verdict, say = os.pipe()
    if os.fork():
        os.close(say)
        with open(verdict) as reader:
            found = reader.read()
        print(found or LOG.read_text(errors="replace"), flush=True)
        sys.exit(0 if found else 1)
    os.close(verdict)
    os.setsid()
    log = os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    PID.write_text(str(os.getpid()))
    os.mkfifo(GO)
    notes = Notes(Path(os.environ["CRAIL_LAB_OUT"]))
    devices = prepare(
        Path(os.environ["CRAIL_LAB_DEVDAX"]), Path(os.environ["CRAIL_LAB_NVME"]), Path("/run/state")
    )
    trio.run(_run, _Program(sys.argv[1], notes, devices, began), say)


async def _run(program: _Program, say: int) -> None:
    await program.check_regions()
    async with trio.open_nursery() as servers, AsyncExitStack() as stack:
        metadata, storage = program.devices
        serve = partial(metadata_server.server.serve, metadata, timings=TIMINGS)
        await servers.start(serve)
        await servers.start(storage_server.server.serve, storage)
        stores = [
            await stack.enter_async_context(CrailStore.connect(program.client_config(*transports)))
            for transports in TRANSPORTS
        ]
        found = await program.check_files(stores[0])
        os.write(say, found.encode())
        os.close(say)
        await trio.to_thread.run_sync(GO.read_text)
        await program.load(stores)


class _Program:
    def __init__(self, seed: str, notes: Notes, devices: Devices, began: float) -> None:
        self.devices = devices
        self._seed = seed
        self._notes = notes
        self._last_round = notes.last_round
        self._found: list[str] = []
        """For people."""
        self._began = began

    def client_config(self, *transports: str) -> ClientConfig:
        metadata = self.devices.metadata
        return ClientConfig(
            metadata=metadata.listen[0], credentials=metadata.credentials, transports=transports
        )

    async def check_regions(self) -> None:
        if not self._last_round:
            return
        for region in self.devices.storage.regions:
            medium = await open_offline(region, self._cluster_id(), BLOCK_SIZE_DEFAULT_BYTES)
            assert medium is not None
            assert medium.durable, f"{region.path}: {medium.kind}"
            if medium.headers is not None:
                count = await check_headers(medium)
                self._found.append(f"{count} headers on {medium.kind}")
            medium.close()

    async def check_files(self, store: CrailStore) -> str:
        """Returns what was found, for people."""
        settled = self._notes.settled()
        if settled is not None:
            await self._check_settled(store, settled)
        if self._last_round:
            settled = await self._settle(store, settled)
        count = await check_ownership(store.filesystem, self.client_config("tcp"))
        if settled is not None:
            self._notes.settle(settled)
        self._found.append(f"{count} blocks as their headers say")
        took = f"{time.monotonic() - self._began:.1f} s"
        return f"verified round {self._last_round} in {took}: {', '.join(self._found)}"

    async def load(self, stores: list[CrailStore]) -> None:
        number = self._last_round + 1
        started = trio.Event()
        async with trio.open_nursery() as nursery:
            for worker, store in enumerate(stores):
                top = self._top(number, worker)
                await make_directories(store, top, CLASSES)
                descriptor = self._notes.acknowledgements(number, worker)

                def acknowledge(step: Step, descriptor: int = descriptor) -> bool:
                    os.write(descriptor, b"d" if step.is_durable else b".")
                    started.set()
                    return True

                history = self._history(number, worker)
                nursery.start_soon(perform, store, top, history, acknowledge)
            await started.wait()
            print("UNDER LOAD", flush=True)

    async def _check_settled(self, store: CrailStore, settled: Settled) -> None:
        """The files of the round before the last."""
        if settled.round >= self._last_round:
            return
        for worker, step in enumerate(settled.steps):
            top = self._top(settled.round, worker)
            history = self._history(settled.round, worker)
            history.run_to(step)
            for name in settled.dropped[worker]:
                del history.files[name]
            found = await observe(store, top)
            difference = history.difference(found, lambda _: False)
            assert difference is None, f"{top}, which was settled: {difference}"
            await store.delete(top, recursive=True)
        self._found.append(f"round {settled.round} unchanged")

    async def _settle(self, store: CrailStore, before: Settled | None) -> Settled:
        """The files of the last round: which steps are there. They are synced then."""
        number = self._last_round
        if before is not None and before.round == number:
            return before  # the cut came before the next round's load
        steps, dropped = [], []
        for worker in range(len(TRANSPORTS)):
            top = self._top(number, worker)
            history = self._history(number, worker)
            promises = self._notes.promises(number, worker)
            found = await observe(store, top)
            settle(
                history,
                found,
                durable=promises.durable,
                acknowledged=promises.acknowledged,
                is_losable=_is_losable,
            )
            lost = [name for name, file in found.items() if None in file.blocks]
            for name in found:
                if name in lost:
                    await store.delete(f"{top}/{name}")
                else:
                    async with await store.open(f"{top}/{name}") as file:
                        await file.sync()
            steps.append(history.number)
            dropped.append(lost)
            self._found.append(
                f"step {history.number} of {promises.durable} durable, "
                f"{promises.acknowledged} acknowledged ({len(found)} files, {len(lost)} had lost "
                "blocks)"
            )
        await store.filesystem.sync()
        return Settled(number, steps, dropped)

    def _history(self, number: int, worker: int) -> History:
        seed = f"{self._seed}/{self._top(number, worker)}"
        return History(seed, tuple(CLASSES), BLOCK_SIZE_DEFAULT_BYTES)

    @staticmethod
    def _top(number: int, worker: int) -> str:
        return f"round{number}-{worker}"

    def _cluster_id(self) -> bytes:
        stored = json.loads((self.devices.storage.state / "server.json").read_text())
        return bytes.fromhex(stored["cluster_id"])


def _is_losable(file: File) -> bool:
    """Bytes in persistent memory are durable before they are committed."""
    return file.directory == "nvme"


if __name__ == "__main__":
    main()
