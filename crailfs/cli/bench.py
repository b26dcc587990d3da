"""``crail bench``: measures directories, the store API, media, RDMA, and what many files cost."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

from crailfs.bench import mount, workloads
from crailfs.bench.report import Report, require_plotting
from crailfs.cli.exit_codes import ExitCode
from crailfs.cli.options import add_cluster_options, target_of
from crailfs.errors import ConfigurationError
from crailfs.records import StorageClass

EXAMPLES = """\
  crail bench mount /mnt/crail /var/tmp
  crail bench mount crail=/mnt/crail tmpfs=/dev/shm --plot bench.png --json > bench.json
  crail bench store --at /mnt/crail --transports local,tcp
  crail bench metadata --at /mnt/crail --files 1000000
  crail bench pmem
  crail bench nvme --directory /mnt/nvme0 --rounds 5
  crail bench rdma --config /etc/crail/crail.toml
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    of_mounts = kinds.add_parser(
        "mount",
        help="the same system calls on each directory, interleaved",
        description="Runs one list of workloads on each directory, one after the other within "
        "each round, and prints medians.",
        epilog="workloads:\n"
        + "\n".join(f"  {each.name:<20}{each.meaning}" for each in workloads.WORKLOADS),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    of_mounts.add_argument(
        "directories", metavar="DIR", nargs="+", help="a directory to measure, or LABEL=DIR"
    )
    of_mounts.add_argument(
        "--processes",
        metavar="N[,N...]",
        default="1,4",
        help="how many processes work at once; each number is a run of its own (default: 1,4)",
    )
    of_mounts.add_argument(
        "--reference",
        metavar="LABEL",
        default="",
        help="the directory that ratios are against (default: the first)",
    )
    _add_report_arguments(of_mounts)

    of_store = kinds.add_parser(
        "store",
        help="the Python API, by each transport",
        description="Measures names and data through the Python API, without a mount.",
    )
    of_store.add_argument(
        "--transports",
        metavar="NAME[,NAME...]",
        default="local,tcp",
        help="each is measured by itself (default: local,tcp)",
    )
    add_cluster_options(of_store)
    _add_report_arguments(of_store)

    of_metadata = kinds.add_parser(
        "metadata",
        help="memory and disk that many files take",
        description="Makes empty files in /crail-bench-files and shows what the servers of an "
        "embedded file system need for them. The files stay.",
    )
    of_metadata.add_argument(
        "--files", metavar="N", type=int, default=1_000_000, help="default: 1000000"
    )
    of_metadata.add_argument("--json", action="store_true", help="print JSON instead of the table")
    add_cluster_options(of_metadata)

    of_pmem = kinds.add_parser(
        "pmem",
        help="the persistent memory tier beside the memory tier",
        description="Starts servers of its own with a region of each tier on this host and "
        "measures both through the client library. In a directory on tmpfs the persistent tier "
        "does the same work, but is not durable.",
    )
    _add_directory_argument(of_pmem, "/dev/shm", "where the persistent region is made")
    _add_report_arguments(of_pmem, rounds=9)

    of_nvme = kinds.add_parser(
        "nvme",
        help="the NVMe tier beside fio, on the same disk",
        description="Runs the same patterns in files of one directory: with fio, with a region's "
        "own reads and writes, and through the client library and servers of its own.",
    )
    _add_directory_argument(of_nvme, "/var/tmp", "a directory on the disk to measure")
    _add_report_arguments(of_nvme)

    of_rdma = kinds.add_parser(
        "rdma",
        help="what is posted, copied and woken for each MiB over RDMA",
        description="Writes and reads files over RDMA and counts verbs, completions, copies and "
        "what the storage servers had to do. Counts, not times.",
    )
    of_rdma.add_argument(
        "--class",
        dest="storage_class",
        metavar="CLASS",
        default="any",
        help="which tiers to write to, e.g. pmem (default: any)",
    )
    of_rdma.add_argument("--json", action="store_true", help="print JSON instead of the table")
    add_cluster_options(of_rdma)


def _add_directory_argument(parser: argparse.ArgumentParser, default: str, meaning: str) -> None:
    parser.add_argument(
        "--directory",
        metavar="DIR",
        type=Path,
        default=Path(default),
        help=f"{meaning} (default: {default})",
    )


def _add_report_arguments(parser: argparse.ArgumentParser, *, rounds: int = 3) -> None:
    parser.add_argument(
        "--rounds",
        metavar="N",
        type=int,
        default=rounds,
        help=f"repetitions of everything (default: {rounds})",
    )
    parser.add_argument(
        "--scale",
        metavar="F",
        type=float,
        default=1.0,
        help="how much each workload does, as a multiple of the usual (default: 1)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--save", metavar="FILE", type=Path, help="write the JSON here as well")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="write a PNG plot here")


def run(options: argparse.Namespace) -> int:
    if options.kind == "metadata":
        return _of_metadata(options)
    if options.kind == "rdma":
        return _of_rdma(options)
    if options.rounds < 1 or not options.scale > 0:
        raise ConfigurationError("--rounds and --scale must be more than 0")
    if options.plot is not None:
        require_plotting()
    report = _MEASURES[options.kind](options)
    if options.save is not None:
        report.write_json(options.save)
    if options.plot is not None:
        report.write_plot(options.plot)
    if options.json:
        print(json.dumps(report.as_json(), indent=1))
    else:
        print(report.table())
    for subject, reason in report.failures.items():
        print(f"crail bench: {subject} was given up: {reason}", file=sys.stderr)
    return ExitCode.FAILED if report.failures else ExitCode.OK


def _of_store(options: argparse.Namespace) -> Report:
    from crailfs.bench import store

    return store.measure(
        target_of(options).settings.client(),
        [name.strip() for name in options.transports.split(",")],
        round_count=options.rounds,
        sizes=store.Sizes().scaled(options.scale),
    )


def _of_metadata(options: argparse.Namespace) -> int:
    from crailfs.bench import metadata

    if options.files < 1:
        raise ConfigurationError("--files must be more than 0")
    state = target_of(options).state
    if state is None:
        raise ConfigurationError(
            "only the servers of an embedded file system can be looked at: name it with --at"
        )
    figures = metadata.measure(state, options.files)
    print(json.dumps(figures.as_json(), indent=1) if options.json else figures.table())
    return ExitCode.OK


def _of_pmem(options: argparse.Namespace) -> Report:
    from crailfs.bench import pmem

    return pmem.measure(
        _directory(options), round_count=options.rounds, sizes=pmem.Sizes().scaled(options.scale)
    )


def _of_nvme(options: argparse.Namespace) -> Report:
    from crailfs.bench import nvme

    return nvme.measure(
        _directory(options), round_count=options.rounds, sizes=nvme.Sizes().scaled(options.scale)
    )


def _directory(options: argparse.Namespace) -> Path:
    directory: Path = options.directory
    if not directory.is_dir():
        raise ConfigurationError(f"--directory {directory}: there is no such directory")
    return directory.absolute()


def _of_rdma(options: argparse.Namespace) -> int:
    from crailfs.bench import rdma

    counts = rdma.measure(
        target_of(options).settings.client(), StorageClass.parse(options.storage_class)
    )
    print(json.dumps(counts.as_json(), indent=1) if options.json else counts.table())
    return ExitCode.OK


def _of_mounts(options: argparse.Namespace) -> Report:
    try:
        process_counts = [int(number) for number in options.processes.split(",")]
    except ValueError:
        process_counts = []
    if not process_counts or min(process_counts) < 1:
        raise ConfigurationError(f"--processes {options.processes}: expected numbers, e.g. 1,4")
    return mount.measure(
        [mount.Subject.parse(text) for text in options.directories],
        round_count=options.rounds,
        process_counts=process_counts,
        sizes=workloads.Sizes().scaled(options.scale),
        reference=options.reference,
    )


_MEASURES: Final[dict[str, Callable[[argparse.Namespace], Report]]] = {
    "mount": _of_mounts,
    "store": _of_store,
    "pmem": _of_pmem,
    "nvme": _of_nvme,
}
