"""The comparison behind ``scripts/bench``: CrailFS, a C FUSE file system, tmpfs and the disk, all
on this machine and in one run; then the store API."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from crailfs.bench import mount, workloads
from crailfs.bench.report import Report
from crailfs.bench.workbench import Workbench, raise_on_signals
from crailfs.errors import CrailError

REFERENCE = "C FUSE"


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    raise_on_signals()
    options.output.mkdir(parents=True, exist_ok=True)
    try:
        with Workbench("bench") as bench:
            failed = _compare(bench, options)
    except KeyboardInterrupt:
        print("interrupted: everything was taken down", file=sys.stderr)
        return 130
    except CrailError as error:
        print(f"bench: {error.message}", file=sys.stderr)
        return 1
    return 1 if failed else 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description="Measures CrailFS (the embedded default) next to libfuse's passthrough_ll.c "
        "over tmpfs, tmpfs itself and the local disk.",
        allow_abbrev=False,
    )
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="default: 3")
    parser.add_argument(
        "--scale", type=float, default=1.0, metavar="F", help="work a round, 1 by default"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("bench-results"),
        metavar="DIR",
        help="where JSON and plots go (default: bench-results)",
    )
    options = parser.parse_args(arguments)
    if options.rounds < 1 or not options.scale > 0:
        parser.error("--rounds and --scale must be more than 0")
    return options


def _compare(bench: Workbench, options: argparse.Namespace) -> bool:
    """Whether anything could not be measured to its end."""
    print(bench.start_crail(), end="", flush=True)
    places = {"tmpfs": bench.shared_memory / "plain", "disk": bench.directory / "disk"}
    below_reference = bench.shared_memory / "below-c-fuse"
    for directory in (*places.values(), below_reference):
        directory.mkdir()
    subjects = [
        mount.Subject("crail", bench.mountpoint),
        mount.Subject(REFERENCE, bench.start_c_reference(below_reference)),
        *(mount.Subject(label, directory) for label, directory in places.items()),
    ]
    report = mount.measure(
        subjects,
        round_count=options.rounds,
        sizes=workloads.Sizes().scaled(options.scale),
        reference=REFERENCE,
    )
    _publish(report, options.output, "mount")
    return bool(report.failures)


def _publish(report: Report, output: Path, name: str) -> None:
    report.write_json(output / f"{name}.json")
    report.write_plot(output / f"{name}.png")
    print(f"\n{report.table()}\n{output}/{name}.json, {output}/{name}.png", flush=True)


if __name__ == "__main__":
    sys.exit(main())
