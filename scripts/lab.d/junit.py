"""JUnit XML: what pytest writes, and what stands in for it where a guest died."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd]")


class Case(NamedTuple):
    """One test case."""

    name: str
    seconds: float
    message: str | None
    """Why it failed; None: it passed."""
    details: str = ""


def write(path: Path, suite: str, cases: Sequence[Case]) -> None:
    """One suite with ``cases``."""
    root = ElementTree.Element("testsuites")
    failures = sum(case.message is not None for case in cases)
    element = ElementTree.SubElement(
        root, "testsuite", name=suite, tests=str(len(cases)), failures=str(failures), errors="0"
    )
    for case in cases:
        told = ElementTree.SubElement(
            element,
            "testcase",
            classname=f"lab.{suite}",
            name=case.name,
            time=f"{case.seconds:.3f}",
        )
        if case.message is not None:
            message = _NOT_XML.sub("?", case.message)
            failure = ElementTree.SubElement(told, "failure", message=message)
            failure.text = _NOT_XML.sub("?", case.details)
    ElementTree.ElementTree(root).write(path, encoding="utf-8", xml_declaration=True)


def merge(parts: Sequence[Path], path: Path) -> None:
    """All suites of ``parts`` in one file. A part that is missing counts as one that failed."""
    root = ElementTree.Element("testsuites")
    for part in parts:
        if not part.exists():
            write(part, part.stem, [Case("run", 0, "it ended without writing results")])
        root.extend(ElementTree.parse(part).getroot().iter("testsuite"))
    ElementTree.ElementTree(root).write(path, encoding="utf-8", xml_declaration=True)


def counts(path: Path) -> dict[str, int]:
    """How many tests, failures (with errors) and skips a file tells of."""
    found = {"tests": 0, "failed": 0, "skipped": 0}
    for suite in ElementTree.parse(path).getroot().iter("testsuite"):
        found["tests"] += int(suite.get("tests", 0))
        found["failed"] += int(suite.get("failures", 0)) + int(suite.get("errors", 0))
        found["skipped"] += int(suite.get("skipped", 0))
    return found
