"""The state directory of a storage server."""

from __future__ import annotations

from pathlib import Path

import pytest

from crailfs.errors import BusyError, ConfigurationError, DamagedError
from storage_server.state import KnownRegion, State

CLUSTER = b"c" * 16


def test_keeps_identity_and_counts_starts(tmp_path: Path) -> None:
    first = State.open(tmp_path / "new" / "state")
    first.close()
    second = State.open(tmp_path / "new" / "state")
    assert second.server_id == first.server_id
    assert len(second.server_id) == 16
    assert (first.epoch, second.epoch) == (1, 2)
    second.close()


def test_remembers_its_cluster_and_regions(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = State.open(tmp_path)
    state.check_cluster(CLUSTER)
    state.remember(CLUSTER, [KnownRegion("/a", "aa" * 16), KnownRegion("/b", "bb" * 16)])
    state.close()
    again = State.open(tmp_path)
    assert again.known_uuid(Path("/b")) == b"\xbb" * 16
    with pytest.raises(ConfigurationError, match="belongs to cluster 63636363"):
        again.check_cluster(b"x" * 16)
    again.remember(CLUSTER, [KnownRegion("/b", "bb" * 16)])
    assert "/a is no longer configured" in caplog.text
    assert again.known_uuid(Path("/a")) is None
    again.close()


def test_one_server_at_a_time(tmp_path: Path) -> None:
    state = State.open(tmp_path)
    with pytest.raises(BusyError, match="another storage server runs"):
        State.open(tmp_path)
    state.close()
    State.open(tmp_path).close()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"epoch": 1', '"epoch": "one"'),
        ('"server_id": "', '"server_id": "zz'),
        ("{", ""),
        ('"format_version": 1', '"format_version": 2'),
        ('"epoch": 1', '"epoch": 1, "surprise": 1'),
    ],
)
def test_a_damaged_file_is_refused_with_what_to_do(tmp_path: Path, old: str, new: str) -> None:
    State.open(tmp_path).close()
    path = tmp_path / "server.json"
    damaged = path.read_text().replace(old, new, 1)
    path.write_text(damaged)
    with pytest.raises(DamagedError, match=r"server\.json"):
        State.open(tmp_path)
    assert path.read_text() == damaged


def test_a_path_that_is_no_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="file cannot be used"):
        State.open(tmp_path / "file")
