"""A mount that was stopped for so long that its session ended, and goes on."""

from __future__ import annotations

import errno
import os
import signal
from functools import partial
from pathlib import Path

import pytest

from tests.support.mounts import in_child
from tests.support.process_cluster import process_cluster
from tests.support.processes import wait_until


@pytest.mark.mount
@pytest.mark.timeout(90)
def test_what_was_not_committed_is_an_error_and_the_rest_goes_on(tmp_path: Path) -> None:
    with process_cluster(tmp_path) as cluster:
        committed = cluster.mountpoint / "committed"
        committed.write_bytes(b"safe" * 1_000)
        descriptor = os.open(cluster.mountpoint / "lost", os.O_WRONLY | os.O_CREAT)
        os.write(descriptor, b"x" * 100_000)
        mount = cluster.running["mount"].process
        mount.send_signal(signal.SIGSTOP)
        try:
            log = cluster.state / "metadata.log"
            wait_until(lambda: "has been silent" in log.read_text(), "the session ended", 30.0)
        finally:
            mount.send_signal(signal.SIGCONT)
        with pytest.raises(OSError) as lost:
            in_child(partial(os.fsync, descriptor), timeout_s=40)
        assert lost.value.errno == errno.EIO
        os.close(descriptor)
        assert in_child(committed.read_bytes, timeout_s=40) == b"safe" * 1_000
        (cluster.mountpoint / "new").write_bytes(b"as before")
        assert (cluster.mountpoint / "new").read_bytes() == b"as before"
        assert (cluster.mountpoint / "lost").stat().st_size == 0
