"""Scoring: the best 50 items of a large catalogue, over all of it and by the index, users a second.

    tests/bench.sh score [--items 50000 1000000] [--threads 1] [--json FILE]     (`tests/bench.sh heads` runs it too)

Vectors as an encoder makes them (d = 64: 62 coordinates of taste of unit length in clusters of uneven size, popularity
with a long tail, a constant); tasks of 32 examples of one to four interests, solved by the bayes head. An index lives
on clusters and on what everybody likes, so --noise measures the worst case instead: random directions, of items and
tasks. What runs is `ItemSearch.best`, as in the service: the index chooses how many lists it looks at by 256 other
tasks.

score.exact.<items>            1,024 users at a time, median of --repeats runs after one that doesn't count
score.index.<items>            the same by the index; not measured where it refuses, because it finds too little
score.<way>.<items>.single     one user at a time, milliseconds, median of 50
score.index.<items>.recall     share of the exact 50 best that the index finds, by place; how many lists it looks at
score.index.<items>.build      seconds to build and measure it, in the background, on one core
score.index.<items>.bytes      per item, besides the vectors
score.exact.<items>.cuda       on a GPU, where there is one and the search is always exact; `.of_floor` is the share of
                               the time that the multiply-adds take at least, at the rate of a large float32 product

Verified: every score of the index is that of the exact product to 1e-4.
"""

import argparse
import sys
import time
from collections.abc import Callable
from statistics import median

import numpy as np
import torch
from gpu import gpu_name, products_per_second
from machine import Report, describe, options
from torch import Tensor

from innerloop.learning.devices import use_threads
from innerloop.learning.heads import BayesHead, Head, NoneHead, Support
from innerloop.learning.item_index import ItemSearch

_TOP, _USERS, _SINGLE, _EXAMPLES, _DIMENSION = 50, 1_024, 50, 32, 64
_TOLERANCE = 1e-4


def main() -> int:
    """Measure, verify, report."""
    asked = _options()
    use_threads(asked.threads)
    report = Report(
        {**describe("-", "-"), "threads": torch.get_num_threads(), "cuda": gpu_name(), "noise": asked.noise}
    )
    with torch.inference_mode():
        measure_scoring(report, asked)
    return report.finish(asked.json)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The sizes of this benchmark, also when another runs it."""
    parser.add_argument("--items", type=int, nargs="*", default=[50_000, 1_000_000], help="to score; none: no scoring")
    parser.add_argument("--noise", action="store_true", help="random directions instead of a shop")


def _options() -> argparse.Namespace:
    parser = options(__doc__)
    add_options(parser)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of torch and the index")
    return parser.parse_args()


def measure_scoring(report: Report, asked: argparse.Namespace) -> None:
    """All rows of this benchmark, of the options asked for."""
    for items in asked.items:
        _measure(report, items, asked)


def _measure(report: Report, items: int, asked: argparse.Namespace) -> None:
    head, vectors, tasks = _noise(items) if asked.noise else _shop(items)
    mine, others = tasks[:_USERS], tasks[_USERS:]
    exact, search = ItemSearch(), ItemSearch(0)
    best = exact.best(head, mine, vectors, _TOP)[0]
    alike = f"two users' lists share {_overlap(best[1:], best[:-1]):.0%}"
    _speed(report, f"score.exact.{items}", lambda some: exact.best(head, some, vectors, _TOP), mine, asked.repeats)
    if torch.cuda.is_available():
        _measure_on_gpu(report, head, vectors, mine, asked.repeats)
    began = time.perf_counter()
    search.best(head, others, vectors, 1)
    search.wait().best(head, others[:1], vectors, _TOP)
    seconds = time.perf_counter() - began
    row = f"score.index.{items}"
    if search.index is None:
        report.missing(
            row, "users/s", f"the index finds too little, exact search goes on; found out in {seconds:.1f} s"
        )
        return
    places, scores = search.best(head, mine, vectors, _TOP)
    if float(((mine.unsqueeze(1) * vectors[places]).sum(2) - scores).abs().max()) > _TOLERANCE:
        raise SystemExit(f"{row}: its scores are not those of the exact product.")
    _speed(report, row, lambda some: search.best(head, some, vectors, _TOP), mine, asked.repeats)
    report.add(f"{row}.recall", _overlap(places, best), "of the exact best 50", f"{search.index.looked_at}; {alike}")
    report.add(f"{row}.build", seconds, "s")
    report.add(f"{row}.bytes", search.index.bytes_per_item, "bytes an item")


def _measure_on_gpu(report: Report, head: Head, vectors: Tensor, tasks: Tensor, repeats: int) -> None:
    """The search on a GPU, which is always exact, and whose scores have to be those of the CPU."""
    device = "cuda"
    search, there, row = ItemSearch(0), vectors.to(device), f"score.exact.{len(vectors)}.{device}"
    expected = ItemSearch().best(head, tasks, vectors, _TOP)[1]

    def run(some: Tensor) -> Tensor:
        scores = search.best(head, some, there, _TOP)[1]
        torch.cuda.synchronize()
        return scores

    if float((run(tasks.to(device)).cpu() - expected).abs().max()) > _TOLERANCE:
        raise SystemExit(f"{row}: its scores are not those of the CPU.")
    rate, floor = _speed(report, row, run, tasks.to(device), repeats), 2 * vectors.numel() / products_per_second(device)
    report.add(f"{row}.of_floor", floor * rate, "of the floor's speed", f"floor {floor * 1e6:.3f} us a user")


def _speed(report: Report, row: str, run: Callable[[Tensor], object], tasks: Tensor, repeats: int) -> float:
    """Tasks per second, as reported."""
    rates = [len(tasks) / _seconds(run, tasks) for _ in range(repeats + 1)][1:]
    report.add_median(row, rates, "users/s")
    alone = [_seconds(run, tasks[user : user + 1]) for user in range(_SINGLE)]
    report.add(f"{row}.single", 1_000.0 * median(alone), "ms")
    return median(rates)


def _seconds(run: Callable[[Tensor], object], tasks: Tensor) -> float:
    began = time.perf_counter()
    run(tasks)
    return time.perf_counter() - began


def _overlap(places: Tensor, best: Tensor) -> float:
    pairs = zip(places.tolist(), best.tolist(), strict=True)
    return float(np.mean([len(set(found) & set(wanted)) / len(wanted) for found, wanted in pairs]))


# --- what is scored


def _shop(items: int) -> tuple[Head, Tensor, Tensor]:
    vectors, clusters = catalogue(items)
    head, tasks = adapted(vectors, clusters, 2 * _USERS)
    return head, vectors, tasks


def _noise(items: int) -> tuple[Head, Tensor, Tensor]:
    rng = np.random.default_rng(0)
    vectors, tasks = (torch.from_numpy(_normal(rng, rows, _DIMENSION)) for rows in (items, 2 * _USERS))
    return NoneHead(torch.zeros(_DIMENSION)), torch.nn.functional.normalize(vectors), tasks


def catalogue(items: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Vectors [items, 64] and the cluster [items] of each: families of clusters, 40 items in the mean."""
    rng = np.random.default_rng(seed)
    taste, clusters = _DIMENSION - 2, max(2, items // 40)
    spectrum = np.arange(1, taste + 1, dtype=np.float32) ** -0.25
    families = _normal(rng, max(2, items // 2_000), taste) * spectrum
    centres = families[rng.integers(0, len(families), clusters)] + 0.8 * _normal(rng, clusters, taste) * spectrum
    sizes = np.arange(1, clusters + 1) ** -0.6
    of_item = rng.choice(clusters, items, p=sizes / sizes.sum())
    vectors = centres[of_item] + 0.6 * _normal(rng, items, taste) * spectrum
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    popularity = np.log1p(rng.zipf(1.7, items).clip(max=100_000)).astype(np.float32)[:, None]
    whole = [vectors, popularity / popularity.max(), np.ones((items, 1), np.float32)]
    return torch.from_numpy(np.concatenate(whole, axis=1)), torch.from_numpy(of_item)


def _normal(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return rng.standard_normal((rows, columns), np.float32)


def adapted(vectors: Tensor, clusters: Tensor, users: int, seed: int = 1) -> tuple[BayesHead, Tensor]:
    """A head whose prior is the users' spread, and the parameters [users, 64] of each."""
    rng = np.random.default_rng(seed)
    by_cluster = np.argsort(clusters.numpy(), kind="stable")
    starts = np.searchsorted(clusters.numpy()[by_cluster], np.arange(int(clusters.max()) + 2))
    interests = clusters.numpy()[rng.integers(0, len(vectors), (users, 4))]
    mine = rng.integers(0, rng.integers(1, 5, (users, 1)), (users, _EXAMPLES))
    of = np.take_along_axis(interests, mine, 1)
    near = by_cluster[rng.integers(starts[of], starts[of + 1])]
    picked = np.where(rng.random(near.shape) < 0.2, rng.integers(0, len(vectors), near.shape), near)
    support = _support(vectors[torch.from_numpy(picked)], rng)
    mean, spread = torch.zeros(_DIMENSION), torch.cov(support.features.mean(1).T)
    mean[-2] = 0.3
    precision = torch.linalg.inv((4.0 * spread + 1e-3 * torch.eye(_DIMENSION)).double())
    share = 1.5 * _EXAMPLES / len(vectors)
    gram = (vectors.T @ vectors).double()
    head = BayesHead.from_prior(mean, precision, gram, alpha=share, noise=0.2, half_life=21_600.0)
    return head, head.adapt(support)


def _support(features: Tensor, rng: np.random.Generator) -> Support:
    users, examples = features.shape[:2]
    every = torch.ones(users, examples)
    ages = torch.from_numpy(86_400.0 * rng.random((users, examples), np.float32))
    return Support(features=features, labels=every, weights=every, ages=ages, mask=every.bool())


if __name__ == "__main__":
    sys.exit(main())
