"""Commands on the other guest, and RDMA between the two."""

from __future__ import annotations

import signal
import subprocess

import pytest

from tests.lab.peer import Peer, PeerError


def test_a_command_runs_on_the_other_host(peer: Peer) -> None:
    said = peer.run(["sh", "-c", "echo $CRAIL_LAB_ADDRESS; echo to stderr >&2"])
    assert said.split("\n")[0] == peer.address
    assert "to stderr" in said


def test_a_failure_there_is_told_with_its_output(peer: Peer) -> None:
    with pytest.raises(PeerError, match=r"(?s)failed with 3.*the reason"):
        peer.run(["sh", "-c", "echo the reason; exit 3"])


def test_what_was_started_there_can_be_killed(peer: Peer) -> None:
    with peer.start(["sh", "-c", "echo up; exec sleep 1000"]) as process:
        process.wait_for("up")
        process.kill()
        assert process.wait() == -signal.SIGKILL
    with pytest.raises(PeerError):
        peer.run(["test", "-e", f"/proc/{process.pid}"])


def test_rdma_reaches_the_other_host(peer: Peer, rdma_device: str) -> None:
    pingpong = ["ibv_rc_pingpong", "-d", rdma_device, "-g", "1", "-n", "10"]
    with peer.start(["stdbuf", "-oL", *pingpong]) as server:
        server.wait_for("GID")
        done = subprocess.run(
            [*pingpong, peer.address], check=False, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        assert server.wait() == 0
