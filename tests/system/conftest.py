import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from shell import Shell, outer_environment

from innerloop.config import Settings


def environment(settings: Settings) -> dict[str, str]:
    """The variables that make these settings."""
    revealed = {name: value.get_secret_value() for name, value in settings.kafka.properties.items()}
    return {
        "INNERLOOP_KAFKA": json.dumps({**settings.kafka.model_dump(), "properties": revealed}),
        "INNERLOOP_TOPICS": settings.topics.model_dump_json(),
        "INNERLOOP_LEARNING__SEQUENCE": "off",  # trains in seconds
        "INNERLOOP_DATABASE__URL": settings.database.url.get_secret_value(),
    }


def _shell(folder: Path, variables: Mapping[str, str]) -> Iterator[Shell]:
    # Wide enough that no sentence is broken into lines.
    shell = Shell(folder, {**outer_environment(), "COLUMNS": "1000", **variables})
    yield shell
    shell.close()
    shell.show_errors()  # beside the test's own failure


@pytest.fixture
def shell(settings: Settings, tmp_path: Path) -> Iterator[Shell]:
    """With services and a migrated database of its own; topics not made yet."""
    yield from _shell(tmp_path, environment(settings))


@pytest.fixture
def bare_shell(tmp_path: Path) -> Iterator[Shell]:
    """With no settings at all."""
    yield from _shell(tmp_path, {})


def _wait_for(look: Callable[[], object], seconds: float = 120.0) -> None:
    until = time.monotonic() + seconds
    while not look():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.1)


@pytest.fixture
def wait_for() -> Callable[..., None]:
    return _wait_for
