"""The installed command, as a user runs it."""

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

INNERLOOP = Path(sys.executable).with_name("innerloop")


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
