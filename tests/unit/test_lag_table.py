"""What `innerloop lag` prints, on terminals of any size."""

import io
import itertools
import time
from contextlib import nullcontext

import pytest
from rich.console import Console

from innerloop.config import Settings
from innerloop.streams.lag import PartitionLag
from innerloop.worker import lag as module
from innerloop.worker.lag import watch_lag
from innerloop.worker.lag_watch import GroupLag, JudgedLag

TOPICS = ("events.clicks", "events.purchases", "events.impressions")
OWNER = "innerloop-host-7f9c/10.0.12.113"


def _group(partitions: int = 4, end: int = 12_345_678) -> GroupLag:
    judged = [
        JudgedLag(
            PartitionLag("innerloop-ingest", topic, partition, committed=end - 50, end=end, offsets=50, seconds=0.2),
            OWNER,
            "warning",
            1.0,
        )
        for topic in TOPICS
        for partition in range(partitions)
    ]
    return GroupLag("innerloop-ingest", judged, "warning", 50 * len(judged), 0.2, 1.0)


def _lines(groups: list[GroupLag], width: int) -> list[str]:
    screen = io.StringIO()
    Console(file=screen, width=width).print(module._shown(groups))
    return screen.getvalue().splitlines()


@pytest.mark.parametrize("width", [80, 200])
def test_every_partition_is_one_line_that_names_it_and_what_waits(width: int) -> None:
    lines = _lines([_group()], width)
    for topic, partition in itertools.product(TOPICS, range(4)):
        [line] = [line for line in lines if f"{topic}[{partition}]" in line]
        assert all(text in line for text in ("12,345,628", "12,345,678", " 50 ", "0.2", "warning"))
        assert (OWNER in line) == (width == 200)


def test_what_it_means_comes_before_what_a_small_terminal_cuts_off() -> None:
    said = "innerloop-ingest warning: 600 records wait, the oldest for 0.2 s; caught up in 1 s at this pace."
    assert _lines([_group(), _group()], 120)[:3] == [said, said, ""]


class _Looks:
    """In the place of reader and watch: three looks, then Ctrl-C."""

    def __init__(self, *_: object, **__: object) -> None:
        self.left = 3

    def look(self) -> list[GroupLag]:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return [_group()]


def test_in_a_pipe_each_look_is_printed_when_it_is_made(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "LagReader", nullcontext)
    monkeypatch.setattr(module, "LagWatch", _Looks)
    monkeypatch.setattr(time, "sleep", lambda _seconds: seen.append(capsys.readouterr().out.count("[0]")))
    seen: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        watch_lag(Settings())
    assert seen == [len(TOPICS)] * 3
