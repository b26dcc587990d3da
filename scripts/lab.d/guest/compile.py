"""Compiles the checkout's copy at SOURCE for guests that will see it as /src.

Run by the image's Python. Tests are compiled as pytest wants them, with their asserts rewritten,
which takes the emulated guest up to 20 s a file and this host next to nothing.
"""

from __future__ import annotations

import ast
import compileall
import importlib.util
import marshal
import sys
from importlib.metadata import version
from pathlib import Path
from types import CodeType

from _pytest.assertion.rewrite import rewrite_asserts

SEEN_AS = Path("/src")


def rewritten(path: Path, seen_as: Path) -> CodeType:
    source = path.read_bytes()
    tree = ast.parse(source, filename=str(seen_as))
    rewrite_asserts(tree, source, str(seen_as))
    return compile(tree, str(seen_as), "exec", dont_inherit=True)


def main() -> None:
    root = Path(sys.argv[1])
    if not compileall.compile_dir(root, quiet=1, stripdir=str(root), prependdir=str(SEEN_AS)):
        raise SystemExit("a module does not compile")
    tag = f"{sys.implementation.cache_tag}-pytest-{version('pytest')}.pyc"
    for path in (root / "tests").rglob("*.py"):
        if not (path.name.startswith("test_") or path.name == "conftest.py"):
            continue
        status = path.stat()
        # As pytest looks for it: magic number, no flags, time and size of the source.
        head = importlib.util.MAGIC_NUMBER + bytes(4)
        for number in (int(status.st_mtime), status.st_size):
            head += (number & 0xFFFFFFFF).to_bytes(4, "little")
        target = path.parent / "__pycache__" / f"{path.stem}.{tag}"
        if target.exists() and target.read_bytes()[: len(head)] == head:
            continue
        target.parent.mkdir(exist_ok=True)
        code = rewritten(path, SEEN_AS / path.relative_to(root))
        target.write_bytes(head + marshal.dumps(code))


if __name__ == "__main__":
    main()
