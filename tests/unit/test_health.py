import io
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from innerloop import metrics
from innerloop.config import HttpSettings
from innerloop.errors import SettingsError
from innerloop.worker.endpoint import listening
from innerloop.worker.health import Health
from innerloop.worker.servers.watched_process import free_ports


@dataclass
class Loop:
    turned_at: float = 0.0
    joined: bool = True


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def port() -> int:
    return free_ports(1)[0]


def get(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_a_loop_that_turns_lives(clock: Clock) -> None:
    loop = Loop()
    health = Health(loop, 10.0, clock=clock)
    clock.now = 10.0
    assert health.live.good
    clock.now = 10.1
    assert not health.live.good
    loop.turned_at = 5.0
    assert health.live.good


def test_it_is_ready_when_the_group_has_given_it_its_partitions(clock: Clock) -> None:
    loop = Loop(joined=False)
    health = Health(loop, 10.0, clock=clock)
    assert health.live.good
    assert not health.ready.good
    assert health.ready.why == "The consumer group has not given this process its partitions yet."
    health = Health(loop, 10.0, unclaimed=lambda: "Not claimed yet: clicks[1] (a lock).", clock=clock)
    assert not health.ready.good
    assert health.ready.why == "Not claimed yet: clicks[1] (a lock)."
    loop.joined = True
    assert health.ready.good
    clock.now = 11.0
    assert not health.ready.good, "a stuck loop is not ready either"


def test_stacks_are_dumped_once_each_time_it_gets_stuck(clock: Clock, tmp_path: Path) -> None:
    loop, entered, leave = Loop(), threading.Event(), threading.Event()

    def hangs_here() -> None:
        entered.set()
        leave.wait()

    thread = threading.Thread(target=hangs_here)
    thread.start()
    entered.wait()
    with (tmp_path / "stacks").open("w+") as stacks:
        health = Health(loop, 10.0, stacks=stacks, clock=clock)

        def dumped() -> str:
            health.look()
            stacks.seek(0)
            return stacks.read()

        try:
            assert dumped() == ""
            clock.now = 11.0
            once = dumped()
            assert "hangs_here" in once
            assert dumped() == once
            loop.turned_at = 12.0
            clock.now = 13.0
            assert dumped() == once
            clock.now = 23.0
            assert dumped().count("hangs_here") == 2
        finally:
            leave.set()
            thread.join()


@pytest.fixture
def answered(clock: Clock, port: int) -> Iterator[tuple[int, Loop]]:
    loop = Loop()
    with listening(HttpSettings(port=port), Health(loop, 10.0, stacks=io.StringIO(), clock=clock)):
        yield port, loop


def test_probes_answer_with_a_sentence(answered: tuple[int, Loop], clock: Clock) -> None:
    port, loop = answered
    assert get(port, "/livez") == (200, "The loop turns.\n")
    loop.joined = False
    assert get(port, "/readyz")[0] == 503
    assert get(port, "/nothing")[0] == 404
    loop.turned_at, clock.now = 0.0, 5.0
    assert get(port, "/livez")[0] == 200


def test_metrics_are_those_declared(answered: tuple[int, Loop]) -> None:
    metrics.EVENTS.labels("stored").inc(3)
    status, text = get(answered[0], "/metrics")
    assert status == 200
    assert 'innerloop_events_total{outcome="stored"}' in text
    assert "innerloop_event_to_score_seconds_bucket" in text


def test_nothing_but_reading_is_offered(answered: tuple[int, Loop]) -> None:
    request = urllib.request.Request(f"http://127.0.0.1:{answered[0]}/livez", data=b"x", method="POST")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=10)  # noqa: S310 - our own
    assert refused.value.code == 405
    refused.value.close()


def test_only_loopback_hears_unless_told_otherwise() -> None:
    assert HttpSettings().host == "127.0.0.1"


def test_a_taken_port_is_a_sentence(answered: tuple[int, Loop], clock: Clock) -> None:
    with (
        pytest.raises(SettingsError, match=r"set http\.port to a free port"),
        listening(HttpSettings(port=answered[0]), Health(Loop(), 1.0, clock=clock)),
    ):
        pass


def test_a_host_that_is_not_ours_is_a_sentence(port: int, clock: Clock) -> None:
    elsewhere = HttpSettings(host="192.0.2.1", port=port)  # RFC 5737: nobody's
    with (
        pytest.raises(SettingsError, match=r"192\.0\.2\.1:\d+ cannot be listened on"),
        listening(elsewhere, Health(Loop(), 1.0, clock=clock)),
    ):
        pass


def test_port_0_is_no_listener_but_a_stuck_loop_still_dumps_its_stacks_once(clock: Clock, tmp_path: Path) -> None:
    with (tmp_path / "stacks").open("w+") as stacks:
        clock.now = 2.0
        with listening(HttpSettings(), Health(Loop(), 1.0, stacks=stacks, clock=clock)) as port:
            assert port == 0
            deadline = time.monotonic() + 30
            while not (tmp_path / "stacks").read_text():
                assert time.monotonic() < deadline
                time.sleep(0.1)
            time.sleep(2.5)
        assert (tmp_path / "stacks").read_text().count("Current thread") == 1


def test_a_loop_that_has_ended_on_purpose_lives_and_says_why_but_is_not_ready(
    clock: Clock,
) -> None:
    health = Health(Loop(), 10.0, clock=clock)
    health.over("most records are bad")
    clock.now = 1_000.0
    assert health.live.good
    assert not health.ready.good
    assert "most records are bad" in health.live.why
    assert "most records are bad" in health.ready.why
