"""The parts of scripts/lab that need no guest."""

from __future__ import annotations

import contextlib
import importlib
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAB = ROOT / "scripts/lab.d"
CONSENT = "i_know_that_these_devices_are_overwritten = true\n"


def lab(*arguments: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(LAB), *arguments],
        check=False,
        env=os.environ | ({} if path is None else {"PATH": path}),
        capture_output=True,
        text=True,
        timeout=100,
    )


def test_real_devices_need_a_consent(tmp_path: Path) -> None:
    file = tmp_path / "lab.toml"
    file.write_text('nvme = "/dev/null"\n')
    done = lab("--host", str(file), "exec", "--", "true")
    assert done.returncode == 1
    assert "overwrite" in done.stderr
    assert CONSENT.strip() in done.stderr


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('nvm = "/dev/null"', "nvm"),
        ('nvme = "/dev/no-such"', "/dev/no-such does not exist"),
        ("nvme = 1", "must be a string"),
        ("nvme = ", "cannot be read"),
    ],
)
def test_a_file_that_is_wrong_is_refused(tmp_path: Path, line: str, told: str) -> None:
    file = tmp_path / "lab.toml"
    file.write_text(f"{CONSENT}{line}\n")
    done = lab("--host", str(file), "exec", "--", "true")
    assert done.returncode == 1
    assert told in done.stderr
    assert "Traceback" not in done.stderr


def test_real_devices_reach_the_tests_and_the_report_comes_back(tmp_path: Path) -> None:
    file = tmp_path / "lab.toml"
    agent = f"{sys.executable} {LAB / 'guest/agent.py'} --stdio"
    file.write_text(f'{CONSENT}peer = "127.0.0.1"\npeer_agent = "{agent}"\naddress = "10.0.0.1"\n')
    probe = tmp_path / "tests" / "test_probe.py"
    probe.parent.mkdir()
    # The lab's own fixtures, in a test outside of the checkout.
    probe.write_text(
        "from tests.lab.conftest import address, devdax, peer\n"
        "def test_peer(peer): assert peer.run(['echo', 'there']) == 'there\\n'\n"
        "def test_address(address): assert address == '10.0.0.1'\n"
        "def test_devdax(devdax): assert False, 'there is none'\n"
    )
    results = tmp_path / "results"
    done = lab("--host", str(file), "run", "--results", str(results), "--", "-q", str(probe))
    assert done.returncode == 0, done.stdout + done.stderr
    suite = ElementTree.parse(results / "run.xml").getroot().find("testsuite")
    assert suite is not None
    told = [suite.get(key) for key in ("name", "tests", "failures", "skipped")]
    assert told == ["run", "3", "0", "1"]


def test_a_run_on_real_devices_that_hangs_is_told(tmp_path: Path) -> None:
    file = tmp_path / "lab.toml"
    file.write_text(CONSENT)
    arguments = ["--results", str(tmp_path), "--limit", "0.5", "--", "sleep", "1000"]
    done = lab("--host", str(file), "exec", *arguments)
    assert done.returncode == 1
    failure = ElementTree.parse(tmp_path / "exec.xml").getroot().find(".//failure")
    assert failure is not None
    assert "not done within" in str(failure.get("message"))


def test_without_qemu_one_line_says_what_was_not_tested(tmp_path: Path) -> None:
    done = lab("--results", str(tmp_path), path="/nowhere")
    assert done.returncode == 0
    assert done.stdout.count("\n") == 1
    assert "qemu-system-x86" in done.stdout
    assert "Not tested: PMem, NVMe, RDMA" in done.stdout
    assert (tmp_path / "summary.txt").read_text() == done.stdout


def test_every_path_of_the_plan_exists() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(LAB)!r})\n"
        "import plan\n"
        "for run in plan.read(0).runs:\n"
        "    for path in run.arguments[1:]:\n"
        "        print(path)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60
    )
    paths = done.stdout.split()
    assert paths
    assert [path for path in paths if not (ROOT / path.partition("::")[0]).exists()] == []


@pytest.mark.parametrize("panics", [0, 1, 2])
def test_a_part_in_which_a_kernel_panicked_is_run_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], panics: int
) -> None:
    monkeypatch.syspath_prepend(str(LAB))
    junit, plan = importlib.import_module("junit"), importlib.import_module("plan")
    attempts = 0

    def attempt(limit_s: float) -> int:
        nonlocal attempts
        attempts += 1
        failed = attempts <= panics
        guest = tmp_path / "part/guest1"
        guest.mkdir(parents=True)
        (guest / "console.log").write_text("Kernel panic - not syncing" if failed else "login:")
        message = "guest1 ended by itself" if failed else None
        junit.write(tmp_path / "part.xml", "part", [junit.Case("guests", 1, message)])
        return int(failed)

    code = plan.carry_out([plan.Step("part", 100, attempt)], 100, tmp_path)
    assert code == (panics == 2)
    assert attempts == 1 + (panics > 0)
    (line,) = (tmp_path / "summary.txt").read_text().splitlines()
    assert ("once more after a guest's panic: part-panicked" in line) == (panics > 0)
    assert (tmp_path / "part-panicked/guest1/console.log").exists() == (panics > 0)


def test_a_part_that_failed_is_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(LAB))
    junit, plan = importlib.import_module("junit"), importlib.import_module("plan")
    attempts = []

    def attempt(limit_s: float) -> int:
        attempts.append(limit_s)
        junit.write(tmp_path / "part.xml", "part", [junit.Case("test", 1, "it failed")])
        return 1

    assert plan.carry_out([plan.Step("part", 100, attempt)], 100, tmp_path) == 1
    assert len(attempts) == 1


@pytest.mark.parametrize("panics", [0, 1, 2, 3])
def test_a_guest_whose_kernel_panicked_while_it_booted_is_booted_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, panics: int
) -> None:
    monkeypatch.syspath_prepend(str(LAB))
    machine = importlib.import_module("machine")
    killed: list[int] = []
    attempts: list[Booting] = []

    class Booting:
        directory = tmp_path
        console = tmp_path / "console.log"

        def wait(self) -> Booting:
            broken = len(attempts) <= panics
            self.console.write_text("Kernel panic - not syncing" if broken else "ready")
            if broken:
                raise machine.GuestError("the guest ended by itself")
            return self

    def start(stack: contextlib.ExitStack) -> list[Booting]:
        attempts.append(Booting())
        stack.callback(killed.append, len(attempts))
        return attempts[-1:]

    with contextlib.ExitStack() as stack:
        if panics == 3:
            with pytest.raises(machine.GuestError):
                machine.boot(stack, start)
        else:
            assert machine.boot(stack, start) == attempts[-1:]
            assert killed == list(range(1, panics + 1))
    assert len(attempts) == min(panics + 1, 3)
    assert killed == list(range(1, len(attempts) + 1))
    assert len(list(tmp_path.glob("console-panicked-*.log"))) == min(panics, 2)


def test_a_guest_that_ends_without_a_panic_is_not_booted_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(LAB))
    machine = importlib.import_module("machine")

    class Booting:
        directory = tmp_path

        def wait(self) -> None:
            raise machine.GuestError("QEMU did not start")

    with contextlib.ExitStack() as stack, pytest.raises(machine.GuestError, match="QEMU"):
        machine.boot(stack, lambda _: [Booting()])
