"""House rules that a reader relies on, held by tests."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from crailfs.errors import ERRORS_BY_CODE, CrailError

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("crailfs", "metadata_server", "storage_server", "fuse_client")
SERVERS = frozenset(PACKAGES[1:])
STARTS_SERVERS = ("crailfs/cli/", "crailfs/bench/", "crailfs/embedded/", "crailfs/spark_jobs/")
"""Front ends of the whole: they alone in ``crailfs`` may import a server."""
LINES_MAX = 610


def tracked(*patterns: str) -> list[Path]:
    done = subprocess.run(
        ["git", "ls-files", "--", *patterns], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [ROOT / line for line in done.stdout.splitlines()]


def sources() -> list[Path]:
    return [path for path in tracked("*.py") if path.relative_to(ROOT).parts[0] in PACKAGES]


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_imports_point_one_way() -> None:
    wrong = []
    for path in sources():
        relative = str(path.relative_to(ROOT))
        package = path.relative_to(ROOT).parts[0]
        foreign = SERVERS - {package}
        if relative.startswith(STARTS_SERVERS):
            foreign = frozenset()
        wrong += [
            f"{relative}: {name}" for name in imports_of(path) if name.split(".")[0] in foreign
        ]
    assert not wrong, "a server imports another, or the library a server"


def test_the_wire_does_no_io() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in sources()
        if path.parent == ROOT / "crailfs" / "wire"
        for name in imports_of(path)
        if name.split(".")[0] in ("trio", "socket", "select", "ssl", "asyncio")
    ]
    assert not wrong


def test_no_module_is_dead() -> None:
    used = {name for path in tracked("*.py") for name in imports_of(path)}
    # Or started with `python -m`.
    started = "".join(
        path.read_text() for path in [*tracked("scripts", "pyproject.toml"), *sources()]
    )
    dead = [
        module_of(path)
        for path in sources()
        if path.name != "__init__.py"
        and module_of(path) not in used
        and module_of(path) not in started
        # Subcommands are found by their file's name.
        and not str(path.relative_to(ROOT)).startswith("crailfs/cli/")
    ]
    assert not dead, "nobody imports these modules"


def test_files_can_be_read_at_a_sitting() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for path in tracked("*.py")
        if (lines := len(path.read_text().splitlines())) > LINES_MAX
    }
    assert not long, f"over {LINES_MAX} lines"


def test_every_error_has_its_row() -> None:
    for code, kind in ERRORS_BY_CODE.items():
        assert kind.wire_code == code
        assert 0 < kind.errno < 4096
        assert isinstance(kind.retryable, bool)
    wire_codes = [kind.wire_code for kind in CrailError.__subclasses__()]
    assert len(set(wire_codes)) == len(wire_codes)


@pytest.mark.parametrize("name", ["requirements.lock", "requirements-build.lock"])
def test_locks_are_hashed_and_name_no_address(name: str) -> None:
    text = (ROOT / name).read_text()
    assert "--hash=sha256:" in text
    assert "://" not in text
    assert "index-url" not in text


def test_nothing_names_a_developer_machine() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}: {word}"
        for path in tracked()
        if path.is_file() and path.suffix not in (".png", ".ico")
        for word in ("/work" + "/main", "/root" + "/.pyenv", "deb.debian" + ".org", "pypi" + ".org")
        if word in path.read_text(errors="replace")
    ]
    assert not wrong
