"""A scratch directory on a mount: what nobody uses goes, what a program has open stays."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.process_cluster import process_cluster
from tests.support.processes import wait_until

pytestmark = [pytest.mark.mount, pytest.mark.slow, pytest.mark.timeout(120)]


def test_scratch_files_go_by_themselves(tmp_path: Path) -> None:
    with process_cluster(tmp_path) as cluster:
        scratch = cluster.mountpoint / "scratch"
        scratch.mkdir()
        os.setxattr(scratch, "user.crail.ttl", b"1s")
        (scratch / "inner").mkdir()
        (scratch / "inner" / "forgotten").write_bytes(b"x" * 300_000)
        (scratch / "open").write_bytes(b"y" * 300_000)
        (cluster.mountpoint / "kept").write_bytes(b"z")
        with (scratch / "open").open("rb") as file:
            wait_until(lambda: not (scratch / "inner").exists(), "files and directory went", 60)
            assert os.listdir(scratch) == ["open"]
            assert file.read() == b"y" * 300_000
        assert (cluster.mountpoint / "kept").exists()
        wait_until(lambda: not os.listdir(scratch), "what was closed went too", 60)
