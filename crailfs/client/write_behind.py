"""Writes to remote storage servers that the writer does not wait for, a bounded number of bytes."""

from __future__ import annotations

from typing import TypeAlias

import trio

from crailfs.client.file_state import FileState
from crailfs.client.storage import StorageAccess
from crailfs.errors import CrailError
from crailfs.limits import CLIENT_WRITE_BEHIND_MAX_BYTES
from crailfs.records import Run
from crailfs.transports import Transport

Buffer: TypeAlias = bytes | bytearray | memoryview


class WriteBehind:
    """Errors are kept in the file's ``write_error``, which ``PendingIo.finish`` raises."""

    def __init__(
        self,
        nursery: trio.Nursery,
        storage: StorageAccess,
        block_size_bytes: int,
        limit_bytes: int = CLIENT_WRITE_BEHIND_MAX_BYTES,
    ) -> None:
        self._nursery = nursery
        self._storage = storage
        self._block_size_bytes = block_size_bytes
        self._limit_bytes = limit_bytes
        self._in_flight_bytes = 0
        self._room = trio.lowlevel.ParkingLot()

    async def send(self, state: FileState, run: Run, data: Buffer, transport: Transport) -> None:
        """Start writing ``data``, which nobody may change any more, to the start of ``run``, over
        ``transport`` or one that took its place."""
        view = memoryview(data)
        offset = run.block * self._block_size_bytes
        piece_bytes = transport.write_piece_bytes
        for begin in range(0, len(view), piece_bytes):
            piece = view[begin : begin + piece_bytes]
            while self._in_flight_bytes and (
                self._in_flight_bytes + len(piece) > self._limit_bytes
            ):
                await self._room.park()
            self._in_flight_bytes += len(piece)
            state.in_flight += 1
            self._nursery.start_soon(
                self._write, state, run.region, offset + begin, run.generation, piece
            )

    async def settle(self, state: FileState) -> None:
        """Wait until nothing of the file is in flight. Raises nothing."""
        while state.in_flight:
            await state.settled.park()

    async def _write(
        self, state: FileState, region: int, offset: int, generation: int, data: memoryview
    ) -> None:
        try:
            transport = await self._storage.transport(region)
            await transport.write(region, offset, generation, data)
        except CrailError as error:
            state.write_error = state.write_error or error
        finally:
            self._in_flight_bytes -= len(data)
            state.in_flight -= 1
            self._room.unpark_all()
            if not state.in_flight:
                state.settled.unpark_all()
