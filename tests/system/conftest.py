import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from innerloop.config import Settings

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


def environment(settings: Settings) -> dict[str, str]:
    """The variables that make these settings."""
    revealed = {name: value.get_secret_value() for name, value in settings.kafka.properties.items()}
    return {
        "INNERLOOP_KAFKA": json.dumps({**settings.kafka.model_dump(), "properties": revealed}),
        "INNERLOOP_TOPICS": settings.topics.model_dump_json(),
        "INNERLOOP_DATABASE__URL": settings.database.url.get_secret_value(),
    }


def _shell(folder: Path, variables: Mapping[str, str]) -> Iterator[Shell]:
    outer = {name: value for name, value in os.environ.items() if not name.startswith("INNERLOOP_")}
    # Wide enough that no sentence is broken into lines.
    shell = Shell(folder, {**outer, "COLUMNS": "1000", **variables})
    yield shell
    shell.close()


@pytest.fixture
def shell(settings: Settings, tmp_path: Path) -> Iterator[Shell]:
    """With services and a migrated database of its own; topics not made yet."""
    yield from _shell(tmp_path, environment(settings))


@pytest.fixture
def bare_shell(tmp_path: Path) -> Iterator[Shell]:
    """With no settings at all."""
    yield from _shell(tmp_path, {})


def _wait_for(look: Callable[[], object], seconds: float = 30.0) -> None:
    until = time.monotonic() + seconds
    while not look():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.1)


@pytest.fixture
def wait_for() -> Callable[..., None]:
    return _wait_for
