"""``kill -9`` of a process that writes blocks and applies their headers, at random instants."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import xxhash

from storage_server.media import pmem_format
from storage_server.media.pmem import PmemMedium
from tests.pmem.applying import BLOCK, SEGMENT_BYTES, Batches, open_region
from tests.pmem.medium_contract import all_headers

ROUNDS = int(os.environ.get("CRAIL_TEST_KILL_ROUNDS", "50")) // 4
SEED = int(os.environ.get("CRAIL_TEST_SEED", "20261120"))
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.fault
@pytest.mark.timeout(300)
@pytest.mark.parametrize("transaction_headers", [1024, 7])
def test_every_header_is_that_of_its_block_after_any_crash(
    directory: Path, transaction_headers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With few headers in a transaction most batches take several: then a crash may leave a part of
    one batch, never anything else."""
    print(f"seed {SEED}, {ROUNDS} rounds")
    monkeypatch.setattr(pmem_format, "SEGMENT_BYTES", SEGMENT_BYTES)
    choose = random.Random(SEED + transaction_headers)
    path = directory / "region"
    open_region(path).close()
    batches = Batches(SEED)
    acknowledged = interrupted = 0
    for _ in range(ROUNDS):
        acknowledged = max(
            acknowledged, _run_and_kill(path, transaction_headers, choose.random() * 0.06)
        )
        medium = open_region(path)
        assert medium.headers.applied_sequence in (acknowledged, acknowledged + 1)
        acknowledged = medium.headers.applied_sequence
        while batches.sequence < acknowledged:
            batches.next()
        interrupted += _check(medium, batches, whole=transaction_headers == 1024)
        medium.close()
    print(f"{acknowledged} batches, {interrupted} of them half applied when the process died")
    assert acknowledged >= ROUNDS


def _run_and_kill(path: Path, transaction_headers: int, after_s: float) -> int:
    """Returns the last sequence that was acknowledged."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.pmem.applying", path, str(SEED), str(transaction_headers)],
        stdout=subprocess.PIPE,
        cwd=REPOSITORY,
    )
    assert process.stdout is not None
    try:
        first = process.stdout.readline()
        time.sleep(after_s)
    finally:
        process.kill()
        lines = process.stdout.read()
        process.stdout.close()
        process.wait(30)
    assert first, "it ended by itself"
    return int((first + lines[: lines.rfind(b"\n") + 1]).split()[-1])


def _check(medium: PmemMedium, batches: Batches, *, whole: bool) -> bool:
    """Whether a batch was applied in part."""
    found = {header.block: header for header in all_headers(medium)}
    assert medium.headers.held_blocks == len(found)
    assert medium.blocks is not None
    owners = set()
    for header in found.values():
        begin = header.block * BLOCK
        data = medium.blocks[begin : begin + header.stored_bytes]
        assert xxhash.xxh3_64_intdigest(data) == header.checksum, header
        owner = (header.ino, header.file_block, header.generation)
        assert owner not in owners, header
        owners.add(owner)
    if found == batches.headers:
        return False
    assert not whole, "a batch of one transaction was applied in part"
    after = Batches(SEED)
    while after.sequence <= batches.sequence:
        after.next()
    for block in found.keys() | batches.headers.keys() | after.headers.keys():
        assert found.get(block) in (batches.headers.get(block), after.headers.get(block))
    return True
