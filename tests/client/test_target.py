"""A program finds the file system of a mount point, and works with it without mounting it."""

from __future__ import annotations

from pathlib import Path

import pytest

from crailfs.client.blocking import BlockingStore
from crailfs.errors import UnavailableError
from crailfs.target import client_config
from tests.support.embedded import embedded


@pytest.mark.mount
@pytest.mark.timeout(60)
def test_a_store_by_mount_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with embedded(tmp_path) as file_system:
        for name, value in file_system.environment.items():
            if name.startswith("CRAIL_"):
                monkeypatch.setenv(name, value)
        file_system.up()
        with BlockingStore(client_config(at=file_system.mountpoint)) as store:
            store.write("/greeting", b"hello")
        assert (file_system.mountpoint / "greeting").read_bytes() == b"hello"


def test_nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRAIL_STATE_HOME", str(tmp_path))
    monkeypatch.delenv("CRAIL_CONFIG", raising=False)
    with pytest.raises(UnavailableError, match="crail up"):
        client_config()
