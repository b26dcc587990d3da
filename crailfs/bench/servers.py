"""A metadata server and a storage server of a benchmark's own, with the regions that it wants."""

from __future__ import annotations

import json
import secrets
import selectors
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from crailfs.bench.workbench import Workbench, last_lines
from crailfs.config import RegionConfig
from crailfs.config_file import OTHER_VARIABLES, Settings
from crailfs.errors import CrailError

_READY_TIMEOUT_SECONDS: Final = 120.0
"""A storage server first makes its regions: a file of some GiB on a slow disk takes a while."""


def start_servers(
    bench: Workbench, regions: Sequence[RegionConfig], *, listen: str = "127.0.0.1"
) -> Settings:
    """Start both as processes that end with ``bench``; what a client of theirs needs to know.

    ``listen``: the address of this host that they listen on for others, besides Unix sockets.

    Raises:
        CrailError: says which one did not start, and why.
    """
    state = bench.directory / "servers"
    state.mkdir()
    secret = state / "secret"
    secret.touch(0o600)
    secret.write_text(secrets.token_hex(32))
    file = state / "crail.toml"
    file.write_text(_configuration(state, regions, listen))
    for name in ("metadata", "storage"):
        _start(bench, name, file)
    return Settings.load(file, environment={})


def _configuration(state: Path, regions: Sequence[RegionConfig], listen: str) -> str:
    def quoted(value: object) -> str:
        return json.dumps(str(value), ensure_ascii=False)

    def addresses(name: str) -> str:
        return f"[{quoted(f'unix:{state / name}.sock')}, {quoted(f'{listen}:0')}]"

    tables = (
        f"[[storage.region]]\ntier = {quoted(region.tier.name.lower())}\n"
        f"path = {quoted(region.path)}\nsize = {region.size_bytes}\n"
        f"overwrite = {str(region.overwrite).lower()}\n"
        for region in regions
    )
    return f"""\
[cluster]
secret_file = {quoted(state / "secret")}
metadata = {quoted(f"unix:{state / 'metadata.sock'}")}

[metadata]
state = {quoted(state / "metadata")}
listen = {addresses("metadata")}

[storage]
state = {quoted(state / "storage")}
listen = {addresses("storage")}
move_rate = 0

{"".join(tables)}"""


def _start(bench: Workbench, name: str, configuration: Path) -> None:
    log = configuration.with_name(f"{name}.log")
    command = [sys.executable, "-m", "crailfs.cli.main", name]
    command += ["--config", str(configuration), "--ready-fd", "1"]
    environment = {
        key: value
        for key, value in bench.environment.items()
        # The file says it all; the caller's environment speaks of other file systems.
        if not (key.startswith("CRAIL_") and key not in OTHER_VARIABLES)
    }
    process = bench.start(command, log, environment)
    line = _first_line(process)
    try:
        notice = json.loads(line)
    except ValueError:
        said = last_lines(log.read_text(errors="replace"))
        raise CrailError(f"crail {name} did not start: {said or 'it said nothing'}") from None
    if "error" in notice:
        raise CrailError(f"crail {name} did not start: {notice['error']}")


def _first_line(process: subprocess.Popen[bytes]) -> bytes:
    """Empty if there is none in time."""
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        if not selector.select(_READY_TIMEOUT_SECONDS):
            return b""
    return process.stdout.readline()
