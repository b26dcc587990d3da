"""A supervisor over whatever commands a test names.

Run as ``python -m tests.cli.supervise STATE REPORT_FD SPECS`` with ``SPECS`` as a JSON list of
``{"name", "code", "ends_all", "stop_timeout_s"}``; ``code`` is a Python program.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path

from crailfs.embedded.child import ChildSpec
from crailfs.embedded.state import State
from crailfs.embedded.supervisor import Supervisor

if __name__ == "__main__":
    directory, report_fd, described = sys.argv[1:]
    logging.basicConfig(stream=sys.stderr, level=logging.INFO)
    os.set_inheritable(int(report_fd), False)
    state = State(Path(directory))
    state.lock()
    specs = [
        ChildSpec(
            each["name"],
            (sys.executable, "-S", "-c", each["code"]),
            stop_timeout_s=each.get("stop_timeout_s", 5.0),
            ends_all=each.get("ends_all", False),
        )
        for each in json.loads(described)
    ]
    sys.exit(Supervisor(state, Path("/nowhere"), specs, int(report_fd)).run())
