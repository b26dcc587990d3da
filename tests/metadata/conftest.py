"""The name space that the metadata tests work on, audited after each of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.metadata.name_space import NameSpace


@pytest.fixture
def space(tmp_path: Path) -> Iterator[NameSpace]:
    name_space = NameSpace(tmp_path / "state")
    yield name_space
    name_space.assert_sound()
    name_space.driver.close()
