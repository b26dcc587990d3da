"""``crail status`` and ``crail fs stat`` say where the bytes are."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator

import pytest

from crailfs.units import MIB
from tests.support.embedded import Embedded, embedded

pytestmark = [pytest.mark.mount, pytest.mark.timeout(90)]


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Embedded]:
    with embedded(tmp_path_factory.mktemp("display")) as running:
        done = running.up()
        assert done.returncode == 0, done.stderr
        yield running


def ask(system: Embedded, *arguments: str) -> str:
    done = system.crail(*arguments, "--at", str(system.mountpoint))
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_status_says_how_full_each_region_is_and_who_its_clients_are(system: Embedded) -> None:
    (system.mountpoint / "file").write_bytes(b"x" * 5 * MIB)
    status = json.loads(ask(system, "status", "--json"))
    assert [tier["durable"] for tier in status["tiers"]] == ["no", "yes"]
    (server,) = status["servers"]
    for region, tier in zip(server["regions"], status["tiers"], strict=True):
        for name in ("used_bytes", "free_bytes"):
            assert region[name] == tier[name]
    memory, disk = server["regions"]
    assert memory["used_bytes"] >= 5 * MIB > disk["used_bytes"]
    assert memory["medium"] == "tmpfs"
    assert server["problem"] is None
    assert [client["transport"] for client in server["clients"]] == ["local"]
    assert server["counters"]["attaches"] >= 1
    text = ask(system, "status")
    assert re.search(r"^memory .* no$", text, re.MULTILINE)
    assert re.search(r"region \d+: memory, tmpfs, not durable, .* of 64.0 MiB used, ", text)
    assert re.search(r"client [0-9a-f]{16} \(this host\): local\n", text)


def test_stat_says_where_a_files_bytes_are(system: Embedded) -> None:
    path = system.mountpoint / "placed"
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
    os.setxattr(path, "user.crail.storage_class", b"disk")
    os.setxattr(path, "user.crail.pin", b"true")
    os.setxattr(path, "user.crail.ttl", b"2h")
    path.write_bytes(b"y" * 100_000)
    shown = json.loads(ask(system, "fs", "stat", "/placed", "--json"))
    assert (shown["pinned"], shown["ttl_seconds"]) == (True, 7_200)
    assert shown["tiers"] == {"disk": {"bytes": 100_000, "blocks": 2}}
    (place,) = shown["places"]
    assert (place["tier"], place["bytes"], place["durable"]) == ("disk", 100_000, True)
    text = ask(system, "fs", "stat", "/placed")
    assert re.search(r"^on disk +100000 bytes in 2 blocks$", text, re.MULTILINE)
    assert re.search(r"region \d+ of \S+ \(.*\): 100000 bytes in 2 blocks$", text, re.MULTILINE)


def test_stat_of_a_directory_has_no_places(system: Embedded) -> None:
    shown = json.loads(ask(system, "fs", "stat", "/", "--json"))
    assert (shown["tiers"], shown["places"]) == ({}, [])
