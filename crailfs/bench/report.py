"""Medians, tables, JSON and plots of what was measured."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from crailfs.errors import ConfigurationError


class Row(NamedTuple):
    """What one line of the table is about."""

    workload: str
    variant: str
    """E.g. the number of processes."""


@dataclass
class Report:
    """Figures of several subjects (directories, transports) on the same workloads."""

    title: str
    subjects: list[str]
    units: Mapping[str, str]
    """Of each workload: ``us``: less is better; anything else is a rate: more is better."""
    variant_name: str
    reference: str
    """The subject that the table's ratios are against."""
    samples: dict[Row, dict[str, list[float]]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    """Why a subject was not measured to the end."""
    notes: list[str] = field(default_factory=list)

    def add(self, row: Row, subject: str, value: float) -> None:
        self.samples.setdefault(row, {}).setdefault(subject, []).append(value)

    def median(self, row: Row, subject: str) -> float | None:
        values = self.samples.get(row, {}).get(subject)
        return statistics.median(values) if values else None

    def ratio(self, row: Row, subject: str, reference: str) -> float | None:
        """The subject's figure divided by the reference's, whatever the unit."""
        value, base = self.median(row, subject), self.median(row, reference)
        return value / base if value is not None and base else None

    def table(self) -> str:
        """Medians, and behind them the ratio to the reference."""
        header = ["workload", self.variant_name, "unit", *self.subjects]
        lines = [header]
        for row in self.samples:
            unit = self.units[row.workload]
            cells = [row.workload, row.variant, unit]
            for subject in self.subjects:
                value = self.median(row, subject)
                if value is None:
                    cells.append("-")
                    continue
                text = f"{value:,.0f}" if value >= 100 else f"{value:,.1f}"
                if subject != self.reference:
                    ratio = self.ratio(row, subject, self.reference)
                    text += "      -" if ratio is None else f" {f'x{ratio:.2f}':>6}"
                cells.append(text)
            lines.append(cells)
        explanation = [
            f"Median of {self.round_count} rounds; x: divided by {self.reference}'s figure. "
            "us: less is better; otherwise more is better.",
            *self.notes,
            *(f"{subject} was given up: {reason}" for subject, reason in self.failures.items()),
        ]
        return "\n".join([aligned(lines), *explanation])

    @property
    def round_count(self) -> int:
        counts = [len(values) for by in self.samples.values() for values in by.values()]
        return max(counts, default=0)

    def as_json(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "machine": {
                "cpu_count": os.cpu_count(),
                "kernel": platform.release(),
                "python": platform.python_version(),
                "load_average": os.getloadavg(),
            },
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "subjects": self.subjects,
            "reference": self.reference,
            "notes": self.notes,
            "failures": self.failures,
            "results": [
                {
                    "workload": row.workload,
                    self.variant_name: row.variant,
                    "unit": self.units[row.workload],
                    "subject": subject,
                    "median": self.median(row, subject),
                    "samples": values,
                    "ratio_to": {
                        other: self.ratio(row, subject, other)
                        for other in self.subjects
                        if other != subject
                    },
                }
                for row, by_subject in self.samples.items()
                for subject, values in by_subject.items()
            ],
        }

    def write_json(self, path: Path) -> None:
        path.write_text(json.dumps(self.as_json(), indent=1) + "\n")

    def write_plot(self, path: Path) -> None:
        """A PNG of bars: rates above, times below, both on a logarithmic axis.

        Raises:
            ConfigurationError: matplotlib is not installed.
        """
        require_plotting()
        from matplotlib.figure import Figure

        groups = [
            (label, rows)
            for label, rows in (
                ("more is better", [row for row in self.samples if self.units[row[0]] != "us"]),
                ("us, less is better", [row for row in self.samples if self.units[row[0]] == "us"]),
            )
            if rows
        ]
        widest = max((len(rows) for _, rows in groups), default=1)
        figure = Figure(figsize=(max(7.0, 0.9 * widest + 2), 4.2 * len(groups)))
        figure.suptitle(self.title)
        for number, (label, rows) in enumerate(groups, 1):
            axes = figure.add_subplot(len(groups), 1, number)
            width = 0.8 / len(self.subjects)
            for position, subject in enumerate(self.subjects):
                values = [self.median(row, subject) or float("nan") for row in rows]
                places = [index + position * width for index in range(len(rows))]
                axes.bar(places, values, width, label=subject)
            units = sorted({self.units[row.workload] for row in rows})
            axes.set_ylabel(label if units == ["us"] else f"{', '.join(units)}, {label}")
            axes.set_yscale("log")
            axes.set_xticks(
                [index + 0.4 - width / 2 for index in range(len(rows))],
                [f"{row.workload}\n{self.variant_name} {row.variant}" for row in rows],
                fontsize=7,
                rotation=30,
                ha="right",
            )
            axes.grid(axis="y", alpha=0.3)
            if number == 1:
                axes.legend(fontsize=8)
        figure.tight_layout()
        figure.savefig(path, dpi=130)


def require_plotting() -> None:
    """
    Raises:
        ConfigurationError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigurationError(
            "--plot needs matplotlib: pip install 'crailfs[bench]', or leave --plot out"
        ) from None


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """A table with a rule under its first line; all columns but the first to the right."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]

    def join(line: Sequence[str]) -> str:
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        return "  ".join(cells).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([join(lines[0]), rule, *(join(line) for line in lines[1:])])
