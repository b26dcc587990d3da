"""Starts the processes of an embedded file system, starts those again that die, and stops all.

Run detached by ``crail up`` as a module, see ``main``.
SIGTERM and SIGINT stop everything in order. It serves nothing itself: while it is dead, the file
system goes on, only nobody restarts what dies.
"""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from crailfs.cli.exit_codes import ExitCode, exit_code_of
from crailfs.cli.logs import set_up_logging
from crailfs.config_file import VARIABLES
from crailfs.embedded.child import Child, ChildSpec
from crailfs.embedded.logs import bound_log
from crailfs.embedded.mountpoint import clean_dead_mount
from crailfs.embedded.process_identity import ProcessIdentity, stop_process
from crailfs.embedded.state import Running, State
from crailfs.errors import CrailError

log = logging.getLogger(__name__)

START_TIMEOUT_S: Final = 60.0
LOG_CHECK_INTERVAL_S: Final = 5.0


class Supervisor:
    """Runs ``specs`` for ``state`` until a signal comes or one that ``ends_all`` ends.

    Specs are started together and in the order given, and stopped in the opposite order.
    ``report_fd`` gets one line of JSON: what runs, or why the start failed.
    """

    def __init__(
        self, state: State, mountpoint: Path, specs: Sequence[ChildSpec], report_fd: int
    ) -> None:
        self._state = state
        self._mountpoint = mountpoint
        self._report_fd = report_fd
        environment = child_environment()
        self._children = [
            Child(spec, state.log_directory / f"{spec.name}.log", environment) for spec in specs
        ]
        self._all_ready_once = False
        self._stop_reason: str | None = None

    def run(self) -> int:
        """Returns the exit code once everything has stopped."""
        wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake_write)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        failure: dict[str, Any] | None = None
        try:
            for child in self._children:
                self._start(child)
            failure = self._supervise(wake_read)
        finally:
            for child in reversed(self._children):
                child.stop()
            self._state.clear_running()
        if failure is not None:
            log.error("start failed: %s", failure["error"])
            self._report(failure)
            return int(failure["exit_code"])
        log.info("stopped: %s", self._stop_reason)
        return ExitCode.OK

    def _supervise(self, wake_read: int) -> dict[str, Any] | None:
        """Until it is time to stop; why the start failed, if it did."""
        deadline = time.monotonic() + START_TIMEOUT_S
        logs_checked_at = 0.0
        while self._stop_reason is None:
            now = time.monotonic()
            if not self._all_ready_once and now > deadline:
                late = ", ".join(each.spec.name for each in self._children if not each.ready)
                return _failure(f"not ready within {START_TIMEOUT_S:g} s: {late}: see the logs")
            if now - logs_checked_at >= LOG_CHECK_INTERVAL_S:
                logs_checked_at = now
                for path in self._state.log_directory.glob("*.log"):
                    bound_log(path)
            for child in self._children:
                if not child.is_running and child.restart_at <= now:
                    self._start(child)
            wake_at = min(
                [
                    logs_checked_at + LOG_CHECK_INTERVAL_S,
                    *([] if self._all_ready_once else [deadline]),
                    *(each.restart_at for each in self._children if not each.is_running),
                ]
            )
            failure = self._wait(wake_read, max(0.0, wake_at - now))
            if failure is not None:
                return failure
        return None

    def _wait(self, wake_read: int, timeout_s: float) -> dict[str, Any] | None:
        """One round of events; why the start failed, if it did."""
        poll = select.poll()
        poll.register(wake_read, select.POLLIN)
        for child in self._children:
            if child.ready_fd >= 0:
                poll.register(child.ready_fd, select.POLLIN)
            if child.pidfd >= 0:
                poll.register(child.pidfd, select.POLLIN)
        events = {fd for fd, _ in poll.poll(timeout_s * 1000)}
        if wake_read in events:
            os.read(wake_read, 4096)
        for child in self._children:
            # The notice first: a process that fails writes one and then ends.
            if child.ready_fd in events:
                failure = self._on_notice(child)
                if failure is not None:
                    return failure
            if child.pidfd in events:
                failure = self._on_exit(child)
                if failure is not None:
                    return failure
        return None

    def _on_notice(self, child: Child) -> dict[str, Any] | None:
        notice = child.read_notice()
        if notice is None:
            return None
        if "error" in notice:
            log.warning("%s failed to start: %s", child.spec.name, notice["error"])
            if not self._all_ready_once:
                return notice
        self._note_running()
        if not self._all_ready_once and all(each.ready for each in self._children):
            self._all_ready_once = True
            log.info("ready at %s", self._mountpoint)
            self._report({"ready": str(self._mountpoint)})
        return None

    def _on_exit(self, child: Child) -> dict[str, Any] | None:
        name, pid = child.spec.name, child.pid
        status = child.collect_exit()
        if status is None:
            return None
        if status == 0 and child.spec.ends_all:
            self._stop_reason = f"{name} ended"
            return None
        if not self._all_ready_once:
            return _failure(
                f"the {name} process ended while it started ({_describe_status(status)}): see "
                f"{child.log_file}"
            )
        delay_s = child.plan_restart()
        log.warning(
            "%s (pid %d) ended: %s; starts again in %g s",
            name,
            pid,
            _describe_status(status),
            delay_s,
        )
        self._note_running()
        return None

    def _start(self, child: Child) -> None:
        try:
            child.start()
        except (OSError, CrailError) as error:
            delay_s = child.plan_restart()
            log.warning(
                "%s cannot be started: %s; tried again in %g s", child.spec.name, error, delay_s
            )
        self._note_running()

    def _note_running(self) -> None:
        me = ProcessIdentity.of(os.getpid())
        assert me is not None
        processes = {child.spec.name: child.describe() for child in self._children}
        self._state.write_running(Running(str(self._mountpoint), me, processes))

    def _on_signal(self, number: int, _frame: object) -> None:
        self._stop_reason = signal.Signals(number).name

    def _report(self, report: dict[str, Any]) -> None:
        """To ``crail up``, which may have been interrupted: then nobody listens."""
        fd, self._report_fd = self._report_fd, -1
        if fd < 0:
            return
        try:
            with os.fdopen(fd, "w") as line:
                line.write(json.dumps(report) + "\n")
        except BrokenPipeError:
            log.info("nobody waits for the report any more")


def specs_for(state: State, mountpoint: Path, *, allow_nonempty: bool) -> tuple[ChildSpec, ...]:
    """Metadata server, storage server and mount; each waits for the one before it by itself."""

    def command(*arguments: str) -> tuple[str, ...]:
        return (
            sys.executable, "-m", "crailfs.cli.main", *arguments,
            "--config", str(state.config_file),
        )  # fmt: skip

    mount = command("mount", str(mountpoint), *(["--nonempty"] if allow_nonempty else []))
    return (
        ChildSpec("metadata", command("metadata"), stop_timeout_s=20.0),
        ChildSpec("storage", command("storage"), stop_timeout_s=10.0),
        ChildSpec(
            "mount",
            mount,
            stop_timeout_s=50.0,
            before_start=lambda: clean_dead_mount(mountpoint),
            ends_all=True,
        ),
    )


def child_environment() -> dict[str, str]:
    """Ours, less the settings: they would change the state's own configuration. With our packages'
    place, because the processes start in ``/`` and we may have been started in a checkout."""
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    packages = str(Path(__file__).resolve().parents[2])
    given = environment.get("PYTHONPATH")
    environment["PYTHONPATH"] = os.pathsep.join([packages, *([given] if given else [])])
    return environment


def stop_leftovers(state: State) -> None:
    """End what a supervisor that was killed has left running. Call with the state locked."""
    running = state.read_running()
    if running is None:
        return
    for name in ("mount", "storage", "metadata"):
        process = running.processes.get(name)
        if process is not None and process.identity is not None and process.identity.is_running:
            log.warning("ending the %s process that the last supervisor left", name)
            stop_process(process.identity, timeout_s=20.0, what=name)
    clean_dead_mount(Path(running.mountpoint))
    state.clear_running()


def _failure(message: str) -> dict[str, Any]:
    return {"error": message, "exit_code": int(ExitCode.FAILED)}


def _describe_status(status: int) -> str:
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit code {status}"


def main(arguments: list[str]) -> int:
    """Arguments: state directory, mount point, descriptor to report to, "nonempty" or "empty"."""
    state_path, mountpoint, report_fd, nonempty = arguments
    set_up_logging("info")
    state = State(Path(state_path))
    fd = int(report_fd)
    os.set_inheritable(fd, False)
    try:
        state.lock()
        stop_leftovers(state)
    except CrailError as error:
        report = {"error": error.message, "exit_code": int(exit_code_of(error))}
        with os.fdopen(fd, "w") as line:
            line.write(json.dumps(report) + "\n")
        return int(exit_code_of(error))
    specs = specs_for(state, Path(mountpoint), allow_nonempty=nonempty == "nonempty")
    return Supervisor(state, Path(mountpoint), specs, fd).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
