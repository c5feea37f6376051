"""Heads: users adapted per second, all at once, against MAML of learn2learn one user after the other.

    tests/bench.sh heads [--users 1000 4096] [--examples 32] [--json FILE]

Each head at d = 64 with 32 examples a user, already in memory; bayes with one gaussian solve and (bayes-logistic) with
three Newton steps, the gradient heads with 5 steps, networks with 32 hidden units, a context of 8 numbers. What runs is
`head.adapt`, with torch's default number of threads or --threads. Numbers are random: only sizes matter for time.

heads.<method>.<users>             median of --repeats runs after one that doesn't count
heads.learn2learn-maml.<users>     learn2learn 0.2.0 in an environment of its own, the same network, examples and steps,
                                   on one thread (more slow it down); one run, cloning included, imports not
heads.<method>.<users>.cuda        the same on a GPU, where there is one, learn2learn on it as well; `.of_floor` is the
                                   share of the time that reading the examples and writing the parameters once (at the
                                   bandwidth of a large copy) or the multiply-adds (at the rate of a large float32
                                   product) take at least, whichever is more
score.*                            scoring large catalogues, exactly and by an index: see score.py; `--items` without a
                                   number leaves it out

Verified: some users adapted alone get the same parameters to 1e-3; every user's network is that of learn2learn to 1e-3.
"""

import argparse
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from gpu import copied_per_second, gpu_name, products_per_second
from machine import CONSOLE, Report, describe, options
from peer_environment import PEERS, PeerError, environment
from score import add_options as add_scoring_options
from score import measure_scoring

from innerloop.learning.devices import use_threads
from innerloop.learning.heads import (
    AnilHead,
    BayesHead,
    CaviaHead,
    Head,
    MamlHead,
    NoneHead,
    PlaceboHead,
    ReptileHead,
    Support,
)
from innerloop.learning.heads.steps import Examples

_UNIT = "users/s"
_HIDDEN, _CONTEXT, _STEPS, _RATE = 32, 8, 5, 0.3
_PEER = "learn2learn-maml"
_CONTROLS = ("none", "placebo")  # measured, but no method to compare
_TOLERANCE = 1e-3
_ALONE = 20
_PEER_SECONDS = 300


def main() -> int:
    """Measure, verify, report."""
    asked = _options()
    use_threads(asked.threads)
    report = Report({**describe("-", "-"), "threads": torch.get_num_threads(), "cuda": gpu_name()})
    support, heads = random_support(max(asked.users), asked.examples, asked.dimension), random_heads(asked.dimension)
    with torch.inference_mode():
        for users in asked.users:
            some = support.take(slice(0, users))
            peer = None if asked.no_peer else _peer(report, heads["maml"], some, "cpu")
            for name, head in heads.items():
                _require_same_alone(name, head, some)
                rates = measure(lambda head=head, some=some: head.adapt(some), users, asked.repeats)  # type: ignore[misc]
                report.add_median(f"heads.{name}.{users}", rates, _UNIT, _compared(name, rates, peer))
        if torch.cuda.is_available():
            _measure_on("cuda", report, heads, support, asked)
        else:
            CONSOLE.print("CUDA: not run, this machine has none.")
        measure_scoring(report, asked)
    return report.finish(asked.json)


def _options() -> argparse.Namespace:
    parser = options(__doc__)
    parser.add_argument("--users", type=int, nargs="+", default=[1_000, 4_096])
    parser.add_argument("--examples", type=int, default=32, help="of each user")
    parser.add_argument("--dimension", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0 leaves it to torch")
    parser.add_argument("--no-peer", action="store_true", help="leave learn2learn out")
    add_scoring_options(parser)
    return parser.parse_args()


def random_support(users: int, examples: int, dimension: int) -> Support:
    """Full support sets of unit features, labels 0 and 1, ages within a day."""
    g = torch.Generator().manual_seed(0)
    shape = (users, examples)
    return Support(
        features=torch.nn.functional.normalize(torch.randn(*shape, dimension, generator=g), dim=-1),
        labels=torch.randint(0, 2, shape, generator=g).float(),
        weights=0.5 + torch.rand(shape, generator=g),
        ages=86_400.0 * torch.rand(shape, generator=g),
        mask=torch.ones(shape, dtype=torch.bool),
    )


def random_heads(dimension: int) -> dict[str, Head]:
    """Every head, with random weights."""
    g = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g) / math.sqrt(shape[-1])

    rates, slope = torch.full((_STEPS,), _RATE).log(), torch.zeros(())
    network = 0.3 * torch.randn(dimension + _HIDDEN * (dimension + 2) + 1, generator=g)
    context = {
        "skip": normal(dimension),
        "first": normal(_HIDDEN, dimension),
        "mix": normal(_HIDDEN, _CONTEXT),
        "bias": normal(_HIDDEN),
        "second": normal(_HIDDEN),
        "rates": rates,
        "slope": slope,
    }
    bayes = BayesHead(normal(dimension), normal(dimension, dimension), 0.2, 21_600.0)
    return {
        "bayes": bayes,
        "bayes-logistic": BayesHead(bayes.mean, bayes.root, 0.2, 21_600.0, "logistic"),
        "anil": AnilHead(normal(dimension), rates, slope),
        "cavia": CaviaHead(context),
        "maml": MamlHead(network, rates, slope, dimension),
        "reptile": ReptileHead(network, rates, slope, dimension),
        "none": NoneHead(bayes.mean),
        "placebo": PlaceboHead(bayes),
    }


def measure(run: Callable[[], torch.Tensor], users: int, repeats: int) -> list[float]:
    """Users per second of each of the runs, after one that doesn't count."""
    rates = []
    for number in range(repeats + 1):
        began = time.perf_counter()
        if run().is_cuda:
            torch.cuda.synchronize()
        if number:
            rates.append(users / (time.perf_counter() - began))
    return rates


def _require_same_alone(name: str, head: Head, support: Support) -> None:
    if isinstance(head, PlaceboHead):  # alone it adapts nobody
        return
    together = head.adapt(support)
    for user in range(0, len(together), max(1, len(together) // _ALONE)):
        alone = head.adapt(support.take(slice(user, user + 1)))[0]
        if float((alone - together[user]).abs().max()) > _TOLERANCE:
            raise SystemExit(f"heads.{name}: user {user} gets other parameters alone than among others.")


# --- the peer


def _peer(report: Report, head: Head, support: Support, device: str) -> float | None:
    """Users per second of learn2learn on the same network, whose parameters have to agree; None if not measured."""
    there = "" if device == "cpu" else f".{device}"
    row = f"heads.{_PEER}.{len(support.mask)}{there}"
    try:
        parameters, rate = _run_peer(head, support, device)
    except PeerError as error:
        report.missing(row, _UNIT, str(error))
        return None
    if float((head.adapt(support) - parameters).abs().max()) > _tolerance(device):
        raise SystemExit(f"{row}: its networks are not those of heads.maml.")
    report.add(row, rate, _UNIT, "one user after the other")
    return rate


def _tolerance(device: str) -> float:
    """By how much parameters may differ from ours on the CPU."""
    return _TOLERANCE if device == "cpu" else 10 * _TOLERANCE


def _compared(name: str, rates: list[float], peer: float | None) -> str:
    """How often as fast as the peer on the same device a method is."""
    return "" if peer is None or name in _CONTROLS else f"{median(rates) / peer:,.0f} times {_PEER}"


def _run_peer(head: Head, support: Support, device: str) -> tuple[torch.Tensor, float]:
    """All users' parameters [T, P], and users per second on the device. Raises PeerError."""
    if not isinstance(head, MamlHead):
        raise TypeError(f"{head.name} is not what the peer does")
    python = environment("learn2learn")
    examples, count = Examples.of(support, head.rule), len(support.mask)
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder) / "given.npz", Path(folder) / "found.npz"
        arrays = {name: getattr(examples, name).numpy() for name in ("features", "labels", "shares")}
        np.savez(given, start=head.start.numpy(), rate=_RATE, steps=_STEPS, hidden=_HIDDEN, **arrays)
        command = [str(python), str(PEERS / "learn2learn_maml.py"), str(given), str(count), str(found), "1", device]
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                check=False,
                timeout=_PEER_SECONDS,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        except subprocess.TimeoutExpired:
            raise PeerError(f"not done after {_PEER_SECONDS} s") from None
        if done.returncode:
            raise PeerError(f"it ended with code {done.returncode}: {done.stderr.strip()[-300:]}")
        with np.load(found) as answer:
            return torch.from_numpy(answer["parameters"]), count / float(answer["seconds"])


# --- a GPU


def _measure_on(
    device: str, report: Report, heads: dict[str, Head], support: Support, asked: argparse.Namespace
) -> None:
    """Every head on the GPU, where its parameters have to be those of the CPU, against what it must at least take.

    The peer is measured on the same device.
    """
    bandwidth, products = copied_per_second(device), products_per_second(device)
    report.add(f"heads.{device}.bandwidth", bandwidth / 1e9, "GB/s", "copy of 1 GiB, read and written")
    report.add(f"heads.{device}.float32", products / 1e12, "TFLOP/s", "product of 8,192 x 8,192 without TF32")
    for users in asked.users:
        some = support.take(slice(0, users))
        there = Support(**{name: values.to(device) for name, values in vars(some).items()})
        peer = None if asked.no_peer else _peer(report, heads["maml"], some, device)
        for name, head in heads.items():
            moved = _moved(head, device)
            if float((moved.adapt(there).cpu() - head.adapt(some)).abs().max()) > _tolerance(device):
                raise SystemExit(f"heads.{name}: the GPU gives other parameters than the CPU.")
            rates = measure(lambda moved=moved, there=there: moved.adapt(there), users, asked.repeats)  # type: ignore[misc]
            floor = max(_bytes(head, some) / bandwidth, _operations(name, some) * users / products)
            report.add_median(f"heads.{name}.{users}.{device}", rates, _UNIT, _compared(name, rates, peer))
            share = floor * median(rates) / users
            report.add(
                f"heads.{name}.{users}.{device}.of_floor", share, "of the floor's speed", f"floor {floor * 1e6:.1f} us"
            )


def _moved(head: Head, device: str) -> Head:
    from innerloop.learning.heads import RESTORE  # noqa: PLC0415

    return RESTORE[head.name]({name: value.to(device) for name, value in head.state().items()})


def _bytes(head: Head, support: Support) -> float:
    """Each example read once and each parameter written once."""
    read = sum(int(values.nbytes) for values in vars(support).values())
    return float(read + len(support.mask) * len(head.prior) * 4)


def _operations(name: str, support: Support) -> float:
    """Floating-point operations a user, multiplications and additions apart, of the products and factors alone."""
    s, d = support.features.shape[1:]
    n = min(s, d)
    solve = 2 * s * d * n + n**3 / 3 + 4 * s * d
    step_of_network = 2 * (3 * s * d * _HIDDEN)
    return {
        "bayes": 2 * s * d * d + solve,
        "placebo": 2 * s * d * d + solve,
        "bayes-logistic": 2 * s * d * d + 3 * solve,
        "anil": _STEPS * 4 * s * d,
        "cavia": 2 * s * d * _HIDDEN + _STEPS * 4 * s * _HIDDEN,
        "maml": _STEPS * step_of_network,
        "reptile": _STEPS * step_of_network,
        "none": 0.0,
    }[name]


if __name__ == "__main__":
    sys.exit(main())
