"""The comparison behind ``scripts/bench``: CrailFS, a C FUSE file system, tmpfs and the disk, all
on this machine and in one run; then the store API, the media, and what many files cost."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Final

from crailfs.bench import metadata, mount, nvme, pmem, store, workloads
from crailfs.bench.report import Report
from crailfs.bench.workbench import Workbench, raise_on_signals
from crailfs.errors import CrailError

REFERENCE: Final = "C FUSE"
_DOWN_TIMEOUT_SECONDS: Final = 120.0


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
        "--files",
        type=int,
        default=1_000_000,
        metavar="N",
        help="how many files to make for the servers' memory (default: 1000000; 0: leave out)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("bench-results"),
        metavar="DIR",
        help="where JSON and plots go (default: bench-results)",
    )
    options = parser.parse_args(arguments)
    if options.rounds < 1 or not options.scale > 0 or options.files < 0:
        parser.error("--rounds and --scale must be more than 0, --files at least 0")
    return options


def _compare(bench: Workbench, options: argparse.Namespace) -> bool:
    """Whether anything could not be measured to its end."""
    began = time.monotonic()
    print(bench.start_crail(), end="", flush=True)
    first_start_seconds = time.monotonic() - began
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
    store_report = store.measure(
        bench.state.settings().client(),
        ("local", "tcp"),
        round_count=options.rounds,
        sizes=store.Sizes().scaled(options.scale),
    )
    _publish(store_report, options.output, "store")
    # Rounds of half a second: many of them, for differences of a few percent.
    pmem_report = pmem.measure(
        round_count=3 * options.rounds, sizes=pmem.Sizes().scaled(options.scale)
    )
    _publish(pmem_report, options.output, "pmem")
    nvme_report = nvme.measure(round_count=options.rounds, sizes=nvme.Sizes().scaled(options.scale))
    _publish(nvme_report, options.output, "nvme")
    if options.files:
        _many_files(bench, options, first_start_seconds)
    return bool(report.failures or store_report.failures)


def _many_files(bench: Workbench, options: argparse.Namespace, first_start_seconds: float) -> None:
    figures = metadata.measure(bench.state, options.files)
    bench.crail("down", str(bench.mountpoint), timeout_seconds=_DOWN_TIMEOUT_SECONDS)
    began = time.monotonic()
    bench.start_crail()
    start_seconds = time.monotonic() - began
    document = {
        **figures.as_json(),
        "start_empty_seconds": first_start_seconds,
        "start_seconds": start_seconds,
    }
    (options.output / "metadata.json").write_text(json.dumps(document, indent=1) + "\n")
    print(
        f"\n{figures.table()}\n`crail up`: {first_start_seconds:.1f} s empty, "
        f"{start_seconds:.1f} s with these files\n{options.output}/metadata.json",
        flush=True,
    )


def _publish(report: Report, output: Path, name: str) -> None:
    report.write_json(output / f"{name}.json")
    report.write_plot(output / f"{name}.png")
    print(f"\n{report.table()}\n{output}/{name}.json, {output}/{name}.png", flush=True)


if __name__ == "__main__":
    sys.exit(main())
