"""The other host's commands, over the pipes of an agent that runs here."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from tests.lab.peer import Peer, PeerError

AGENT = Path(__file__).resolve().parents[2] / "scripts/lab.d/guest/agent.py"


@pytest.fixture
def peer() -> Peer:
    return Peer("127.0.0.1", f"{sys.executable} {AGENT} --stdio")


def exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_output_exit_code_environment_and_directory(peer: Peer, tmp_path: Path) -> None:
    script = "printf '%s\\n' \"$WORD\"; pwd; echo worse >&2"
    said = peer.run(["sh", "-c", script], env={"WORD": "grüße"}, cwd=str(tmp_path))
    assert said.splitlines() == ["grüße", str(tmp_path), "worse"]
    with pytest.raises(PeerError, match=r"(?s)failed with 7.*because"):
        peer.run(["sh", "-c", "echo because; exit 7"])
    assert peer.run(["false"], check=False) == ""


def test_a_command_that_does_not_exist(peer: Peer) -> None:
    with pytest.raises(PeerError, match="no-such-command"):
        peer.start(["no-such-command"])


def test_a_process_is_followed_and_signalled(peer: Peer) -> None:
    with peer.start(["sh", "-c", "echo up; read never; sleep 1000"]) as process:
        # Standard input is empty, so it sleeps.
        process.wait_for("up")
        with pytest.raises(TimeoutError):
            process.wait(0.05)
        process.signal(signal.SIGTERM)
        assert process.wait() == -signal.SIGTERM


def test_waiting_for_words_that_never_come_tells_what_did(peer: Peer) -> None:
    process = peer.start(["echo", "something else"])
    with process, pytest.raises(PeerError, match="something else"):
        process.wait_for("ready")


def test_leaving_the_block_kills_the_command_and_its_children(peer: Peer) -> None:
    with peer.start(["sh", "-c", "sleep 1000 & echo $!; wait"]) as process:
        child = int(process.wait_for("\n"))
    assert not exists(process.pid)
    # Orphaned, it is reaped by whoever adopts it: gone or about to be.
    state = Path(f"/proc/{child}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] in "ZX"
