"""That the heads' benchmark measures the peer on the device that the heads are on, and compares them there.

The peer's script runs as it is, on a stand-in for learn2learn that does what its MAML does: an environment with the
real one takes minutes to install, and only the benchmark does.
"""

import argparse
import sys
from pathlib import Path

import heads
import pytest
import torch
from machine import Report

from innerloop.learning.heads import Head, Support

_DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
_STAND_IN = """
import copy, types
import torch

class MAML:
    def __init__(self, module, lr, first_order):
        assert first_order
        self.module, self.lr = module, lr

    def clone(self):
        return MAML(copy.deepcopy(self.module), self.lr, True)

    def __call__(self, x):
        return self.module(x)

    def parameters(self):
        return self.module.parameters()

    def adapt(self, loss):
        gradients = torch.autograd.grad(loss, list(self.parameters()))
        for parameter, gradient in zip(self.parameters(), gradients, strict=True):
            parameter.data -= self.lr * gradient

algorithms = types.SimpleNamespace(MAML=MAML)
"""


@pytest.fixture
def case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Head], Support]:
    """Heads and support sets of a few users, and the stand-in where the peer's interpreter finds it."""
    (tmp_path / "learn2learn.py").write_text(_STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(heads, "environment", lambda _peer: Path(sys.executable))
    monkeypatch.setattr(heads, "copied_per_second", lambda _device: 1e9)
    monkeypatch.setattr(heads, "products_per_second", lambda _device: 1e9)
    return heads.random_heads(8), heads.random_support(6, 5, 8)


def _rows(report: Report) -> dict[str, tuple[object, str]]:
    return {str(row["name"]): (row["value"], str(row.get("note", ""))) for row in report._rows}


@pytest.mark.parametrize("device", _DEVICES)
def test_the_peer_runs_on_the_device_and_gives_our_networks(case: tuple[dict[str, Head], Support], device: str) -> None:
    mine, support = case
    parameters, rate = heads._run_peer(mine["maml"], support, device)
    torch.testing.assert_close(parameters, mine["maml"].adapt(support), atol=heads._tolerance(device), rtol=0)
    assert rate > 0


@pytest.mark.parametrize("device", _DEVICES)
def test_on_a_device_every_method_is_compared_with_the_peer_there(
    case: tuple[dict[str, Head], Support], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, support = case
    asked = argparse.Namespace(users=[6], repeats=1, no_peer=False)
    asked_for: list[str] = []
    run = heads._run_peer

    def spied(head: Head, some: Support, where: str) -> tuple[torch.Tensor, float]:
        asked_for.append(where)
        return run(head, some, where)

    monkeypatch.setattr(heads, "_run_peer", spied)
    report = Report({"cores": 1, "cpu": "", "date": ""})
    heads._measure_on(device, report, mine, support, asked)
    assert asked_for == [device]
    rows, there = _rows(report), "" if device == "cpu" else f".{device}"
    assert rows[f"heads.learn2learn-maml.6{there}"][0]
    for name in mine:
        value, note = rows[f"heads.{name}.6.{device}"]
        assert value
        assert ("times learn2learn-maml" in note) == (name not in {"none", "placebo"})


def test_where_the_peer_cannot_run_its_row_says_why_and_nothing_is_compared(
    case: tuple[dict[str, Head], Support],
) -> None:
    mine, support = case
    report = Report({"cores": 1, "cpu": "", "date": ""})
    assert heads._peer(report, mine["maml"], support, "nowhere") is None
    value, note = _rows(report)["heads.learn2learn-maml.6.nowhere"]
    assert value is None
    assert "device" in note
    assert heads._compared("maml", [1.0], None) == ""
