"""Runs one server as its child and stops it when the process that asked for it is gone, however that went.

Started by `watched_process.py` as a plain script, with the standard library alone, so that it is up in a few
milliseconds. Standard input is a pipe whose write end only the asking process has: a byte on it is a signal number to
pass on, its end means that the asker is gone (a kill -9 closes pipes too). Standard output gets one line: the server's
pid, or why it could not be started.
"""

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

LATER_PAUSE = 5.0
"""Seconds between the second signal and the third; the first pause is the order's `grace`."""


class Watch:
    """One server, from its start to its end."""

    def __init__(self, order: dict[str, Any]) -> None:
        self.order = order
        self.orphaned = False
        with Path(order["log"]).open("ab") as log:
            self.child = subprocess.Popen(
                order["command"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                **order["identity"],
            )

    def obey(self) -> None:
        """Pass signals on until the pipe ends, then end the server."""
        while byte := os.read(0, 1):
            self.child.send_signal(byte[0])
        self.end()

    def end(self) -> None:
        """Send the signals of the order one after the other, from the polite one to the last resort."""
        self.orphaned = True
        pause = self.order["grace"]
        for number in self.order["endings"]:
            self.child.send_signal(number)
            time.sleep(pause)  # the main thread leaves, and this one with it, as soon as the server is gone
            pause = LATER_PAUSE

    def clean_up(self) -> None:
        """Remove temporary data when nobody else is left to do it."""
        folder = self.order["remove"]
        if self.orphaned and folder:
            import shutil  # noqa: PLC0415 - only orphans need it, and a start should not wait for it

            shutil.rmtree(folder, ignore_errors=True)
            try:
                Path(folder).parent.rmdir()
            except OSError:
                return  # the other server's data is still there: its watch removes the folder


def main() -> int:
    """Start, watch, and report the server's own exit code."""
    order = json.loads(sys.argv[1])
    with Path(order["lock"]).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a server that is still stopping on this folder goes first
        try:
            watch = Watch(order)
        except OSError as error:
            os.write(1, f"{error}\n".encode())
            return 1
        # A handler, not SIG_IGN: what is ignored stays ignored in the server.
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: threading.Thread(target=watch.end, daemon=True).start())
        os.write(1, f"{watch.child.pid}\n".encode())
        threading.Thread(target=watch.obey, daemon=True).start()
        code = watch.child.wait()
        watch.clean_up()
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
