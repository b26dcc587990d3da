"""A client of the Python API that is killed or stopped in mid-write by whoever started it.

    python -m tests.faults.vanishing CONFIGURATION TRANSPORT PATH

Says ``written`` when bytes are written that no commit has published; waits for a line on stdin;
then flushes and says how that ended, and writes PATH anew in a store that goes on.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from crailfs.client.blocking import BlockingStore
from crailfs.config_file import Settings
from crailfs.errors import CrailError
from crailfs.units import MIB

COMMITTED = b"committed " * 20_000
UNCOMMITTED = b"never published " * (6 * MIB // 16)
AGAIN = b"written again " * 50_000


def main() -> None:
    configuration, transport, path = sys.argv[1:]
    logging.basicConfig(level=logging.ERROR)
    settings = Settings.load(Path(configuration), [f"client.transports={transport}"])
    with BlockingStore(settings.client()) as store:
        file = store.create(path)
        file.write(COMMITTED)
        file.flush()
        file.write_at(100, UNCOMMITTED)
        print("written", flush=True)
        sys.stdin.readline()
        try:
            file.flush()
        except CrailError as error:
            print(f"{type(error).__name__}: {error}", flush=True)
        else:
            print("no error", flush=True)
        file.close()
        store.write(path, AGAIN)
        print("written again", flush=True)


if __name__ == "__main__":
    main()
