"""JUnit XML: what pytest writes, and what stands in for it where a guest died."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd]")


def write_failure(path: Path, name: str, message: str, details: str, seconds: float) -> None:
    """One suite with one test case, which failed."""
    write_cases(path, name, [(name, seconds, message, details)])


def write_cases(
    path: Path, suite: str, cases: Sequence[tuple[str, float, str | None, str]]
) -> None:
    """One suite; each case is its name, its seconds, why it failed (None: it passed), details."""
    root = ElementTree.Element("testsuites")
    failures = sum(message is not None for _, _, message, _ in cases)
    element = ElementTree.SubElement(
        root, "testsuite", name=suite, tests=str(len(cases)), failures=str(failures), errors="0"
    )
    for name, seconds, message, details in cases:
        case = ElementTree.SubElement(
            element, "testcase", classname=f"lab.{suite}", name=name, time=f"{seconds:.3f}"
        )
        if message is not None:
            failure = ElementTree.SubElement(case, "failure", message=_NOT_XML.sub("?", message))
            failure.text = _NOT_XML.sub("?", details)
    ElementTree.ElementTree(root).write(path, encoding="utf-8", xml_declaration=True)


def counts(path: Path) -> dict[str, int]:
    """How many tests, failures (with errors) and skips a file tells of."""
    found = {"tests": 0, "failed": 0, "skipped": 0}
    for suite in ElementTree.parse(path).getroot().iter("testsuite"):
        found["tests"] += int(suite.get("tests", 0))
        found["failed"] += int(suite.get("failures", 0)) + int(suite.get("errors", 0))
        found["skipped"] += int(suite.get("skipped", 0))
    return found
