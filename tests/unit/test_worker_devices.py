"""How many worker processes there are, what each computes on, and with how many threads."""

import os

import pytest

from innerloop.errors import SettingsError
from innerloop.learning import devices
from innerloop.worker.devices import Share, shares


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 cores and no GPU."""
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(devices, "gpus", list)


def _with_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(devices, "gpus", lambda: [f"cuda:{number}" for number in range(count)])


def test_without_a_gpu_one_worker_has_all_cores() -> None:
    assert shares("auto", None, 4) == [Share("cpu", 16)]


def test_workers_on_the_cpu_have_equal_parts_of_the_cores() -> None:
    assert shares("auto", 3, 4) == [Share("cpu", 5)] * 3
    assert shares("cpu", 40, 4) == [Share("cpu", 1)] * 40


def test_a_gpu_has_a_worker_for_every_two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    _with_gpus(monkeypatch, 1)
    assert shares("auto", None, 64) == [Share("cuda:0", 2)] * 8
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    assert shares("auto", None, 64) == [Share("cuda:0", 1)]


def test_gpus_share_the_cores_and_have_as_many_workers_each(monkeypatch: pytest.MonkeyPatch) -> None:
    _with_gpus(monkeypatch, 2)
    assert shares("auto", None, 64) == [Share("cuda:0", 2), Share("cuda:1", 2)] * 4


def test_a_gpu_has_no_more_than_eight_and_all_no_more_than_there_are_partitions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _with_gpus(monkeypatch, 1)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert len(shares("auto", None, 64)) == 8
    assert shares("auto", None, 4) == [Share("cuda:0", 16)] * 4
    _with_gpus(monkeypatch, 8)
    assert [share.device for share in shares("auto", None, 4)] == [f"cuda:{number}" for number in range(8)]


def test_what_is_asked_for_is_given_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    _with_gpus(monkeypatch, 2)
    assert [share.device for share in shares("auto", 5, 4)] == ["cuda:0", "cuda:1", "cuda:0", "cuda:1", "cuda:0"]
    assert [share.device for share in shares("cuda:1, cpu", None, 8)] == ["cuda:1", "cpu", "cuda:1", "cuda:1", "cuda:1"]


@pytest.mark.parametrize(
    ("asked", "said"), [(" , ", "is empty"), ("cuda:0", "no device cuda:0"), ("cpu,gpu", "no device gpu")]
)
def test_what_is_not_there_is_refused(asked: str, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        shares(asked, None, 4)
