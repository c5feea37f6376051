"""The installed command, as a user runs it."""

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

INNERLOOP = Path(sys.executable).with_name("innerloop")
_NOT_A_USERS = ("INNERLOOP_", "PYTEST_")


def outer_environment() -> dict[str, str]:
    """This process's environment as a user's would be: no settings, and nothing that says it is a test.

    The web framework of the console looks for the latter, and does not start where it finds it.
    """
    return {name: value for name, value in os.environ.items() if not name.startswith(_NOT_A_USERS)}


@dataclass
class Result:
    code: int
    out: str
    err: str


@dataclass
class Shell:
    """The installed command, as a user runs it: from an empty directory, with settings from the environment."""

    folder: Path
    environment: dict[str, str]
    _started: list["subprocess.Popen[str]"] = field(default_factory=list)

    def start(self, *arguments: str, **more: str) -> "subprocess.Popen[str]":
        with (self.folder / f"{len(self._started)}.err").open("w") as errors:
            process = subprocess.Popen(
                [str(INNERLOOP), *arguments],
                cwd=self.folder,
                env={**self.environment, **more},
                text=True,
                stdout=subprocess.PIPE,
                stderr=errors,
            )
        self._started.append(process)
        return process

    def errors(self, process: "subprocess.Popen[str]") -> str:
        """What it has written to standard error so far."""
        return (self.folder / f"{self._started.index(process)}.err").read_text()

    def finish(self, process: "subprocess.Popen[str]", seconds: float = 60.0) -> Result:
        out, _ = process.communicate(timeout=seconds)
        return Result(process.returncode, out, self.errors(process))

    def run(self, *arguments: str, **more: str) -> Result:
        return self.finish(self.start(*arguments, **more))

    def close(self) -> None:
        for process in self._started:
            if process.poll() is None:
                process.kill()
            process.communicate()

    def show_errors(self) -> None:
        """Write out what each has written to standard error."""
        for process in self._started:
            sys.stderr.write(f"--- {process.args!r} left with {process.returncode}:\n{self.errors(process)}")
