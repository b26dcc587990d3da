"""What the metadata tests work on, audited after each of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.metadata.handling import Server
from tests.metadata.name_space import NameSpace


@pytest.fixture
def space(tmp_path: Path) -> Iterator[NameSpace]:
    name_space = NameSpace(tmp_path / "state")
    yield name_space
    name_space.assert_sound()
    name_space.driver.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path / "state")
    yield server
    assert server.driver.audit().findings == ()
    server.driver.close()
