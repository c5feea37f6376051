"""Adapt: users per second, from support sets in Postgres to encoded score records.

    tests/bench.sh adapt [--users 20000] [--device cpu] [--sequence] [--json FILE]

The default head (bayes, d = 64) with 32 examples a user, the 50 best of 50,000 items, torch's default number of
threads in one process. The release is random: only its sizes matter for time. What runs is `innerloop.adapt.Adapt`
itself; its publisher is replaced by one that counts and keeps the records, so that neither Kafka's queue nor its
network is in any figure.

adapt.batched               requests for all users, 4,096 at a time as the loop polls them: read, solve, score, encode
adapt.batched.<step>_us     microseconds a user of each step in that run, by the product's own metric (on a GPU, which
                            works behind, what solving costs shows in the score step)
adapt.one_by_one            the same, one user a call, for the first --single users
adapt.solve_only            head.adapt alone on support sets in memory, 1,024 at a time
adapt.score_only            the search for the best items alone, 1,024 parameter vectors at a time

Each figure is the median of --repeats runs after one that doesn't count. Verified: every user has a record of 50
items in falling order; one by one gives the same lists as batched; for a sample the solution and its scores are
computed once more in float64 from the formula, and agree to 1e-3.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import msgspec
import numpy as np
import torch
from cluster import running_cluster
from machine import Report, describe, options
from prometheus_client import REGISTRY
from random_release import random_release, with_ranker, with_sequence
from sqlalchemy import Engine, text

from innerloop.adapt import Adapt
from innerloop.config import Settings
from innerloop.learning.heads import BayesHead
from innerloop.learning.ranking import top_k
from innerloop.learning.releases import Release, save
from innerloop.learning.scorer import padded
from innerloop.scores import RecommendationScores
from innerloop.store import items, releases, support_sets
from innerloop.store.database import connect, transaction
from innerloop.support import EXAMPLE, SupportSets
from innerloop.trends import ACTIVITY, PREVIOUS, Activity

_UNIT = "users/s"
_AT_ONCE = 1_024
_ACTIVITY = 200 * _AT_ONCE
_STEPS = ("read", "solve", "score", "sequence", "candidates", "rank", "encode", "publish")
_TOLERANCE = 1e-3
_SAMPLE = 50
_WRITTEN_AT_ONCE = 20_000
_NEWEST_MS = 1_750_000_000_000


class Kept:
    """In the publisher's place: keeps what was sent instead of sending it."""

    def __init__(self) -> None:
        self.records: dict[str, bytes] = {}
        self.sent = 0

    def send(self, _topic: str, key: str, value: bytes, **_: Any) -> None:
        self.sent += 1
        self.records[key] = value

    def flush(self, _seconds: float) -> None:
        """Nothing waits."""


class Bench:
    """One Adapt over a database of users, and the same support sets in memory."""

    def __init__(self, asked: argparse.Namespace, settings: Settings, folder: Path) -> None:
        self.users = [f"user-{number}" for number in range(asked.users)]
        self.batch, self.repeats, self.device = settings.adapt.batch_users, asked.repeats, torch.device(asked.device)
        self.sequence = asked.sequence
        self.release = random_release(asked.items, settings.learning.dimension)
        engine = connect(settings.database)
        self.sets = random_sets(asked.users, asked.examples, asked.items)
        fill(engine, self.users, self.sets, self.release, folder)
        self.kept = Kept()
        unused: Any = Mock()
        publisher: Any = self.kept
        self.adapt = Adapt(settings, engine, unused, publisher, unused, device=asked.device)
        self.adapt._epochs = {0: 1}

    def rate(self, run: Callable[[], int]) -> list[float]:
        """Users per second of each of the runs, after one that doesn't count."""
        run()
        rates = []
        for _ in range(self.repeats):
            began = time.perf_counter()
            users = run()
            rates.append(users / (time.perf_counter() - began))
        return rates

    def rank(self) -> None:
        """From now on lists are ranked: a ranker, and a stream of activity to find candidates in."""
        scorer = self.adapt._scorer
        scorer.use(with_ranker(with_sequence(self.release) if self.sequence else self.release))
        for first in range(0, _ACTIVITY, _AT_ONCE):
            scorer.observe(_random_activity(first, len(self.release.item_ids)))

    def batched(self) -> int:
        for first in range(0, len(self.users), self.batch):
            self.adapt._adapt(dict.fromkeys(self.users[first : first + self.batch], 0))
        return len(self.users)

    def one_by_one(self, count: int) -> int:
        for user in self.users[:count]:
            self.adapt._adapt({user: 0})
        return count

    def solve_only(self) -> Callable[[], int]:
        """A run over support sets that are already on the device."""
        catalogue = self.adapt._scorer.catalogue
        supports = [
            padded(_part(self.sets, first), catalogue)
            for first in range(0, min(len(self.users), 4 * _AT_ONCE), _AT_ONCE)
        ]

        def run() -> int:
            with torch.inference_mode():
                parameters = [catalogue.head.adapt(support) for support in supports]
            self._wait()
            return sum(map(len, parameters))

        return run

    def score_only(self, top: int) -> Callable[[], int]:
        """A run over parameters that are already on the device; indices and scores stay there."""
        vectors = self.adapt._scorer.catalogue.vectors
        parameters = torch.randn(_AT_ONCE, vectors.shape[1], device=self.device)

        def run() -> int:
            with torch.inference_mode():
                top_k(parameters, vectors, top)
            self._wait()
            return len(parameters)

        return run

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def main() -> int:
    """Measure, verify, report."""
    asked = _options()
    with running_cluster(kafka=False) as cluster, cluster.database() as database:
        report = Report({**describe("-", cluster.postgres_version()), **_device(asked.device)})
        settings = cluster.settings(database)
        everybody = settings.quality.model_copy(update={"hold_out": 0.0})  # whose lists are those of the formula
        settings = settings.model_copy(update={"quality": everybody})
        bench = Bench(asked, settings, cluster.folder)
        _measure(report, bench, asked, settings.adapt.top)
        return report.finish(asked.json)


def _options() -> argparse.Namespace:
    parser = options(__doc__)
    parser.add_argument("--users", type=int, default=20_000)
    parser.add_argument("--items", type=int, default=50_000)
    parser.add_argument("--examples", type=int, default=32, help="of each user")
    parser.add_argument("--single", type=int, default=500, help="users adapted one by one")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sequence", action="store_true", help="lists by a sequence model, too")
    return parser.parse_args()


def _device(name: str) -> dict[str, object]:
    if name == "cpu":
        return {"device": "cpu", "threads": torch.get_num_threads()}
    return {"device": torch.cuda.get_device_name(name), "threads": torch.get_num_threads()}


def _measure(report: Report, bench: Bench, asked: argparse.Namespace, top: int) -> None:
    before = _seconds()
    rates = bench.rate(bench.batched)
    spent = {step: seconds - before[step] for step, seconds in _seconds().items()}
    batched = _lists(bench.kept.records)
    _require_right(bench, batched, top)
    report.add_median("adapt.batched", rates, _UNIT, f"{asked.users:,} users, {bench.batch:,} requests a batch")
    for step in _STEPS:
        report.add(f"adapt.batched.{step}_us", spent[step] * 1e6 / (asked.users * (asked.repeats + 1)), "us/user")
    bench.kept.records.clear()
    rates = bench.rate(lambda: bench.one_by_one(asked.single))
    _require_equal(batched, _lists(bench.kept.records), min(asked.single, asked.users))
    report.add_median("adapt.one_by_one", rates, _UNIT, f"{asked.single:,} users, one a call")
    bench.rank()
    before = _seconds()
    rates = bench.rate(bench.batched)
    spent = {step: seconds - before[step] for step, seconds in _seconds().items()}
    report.add_median("adapt.ranked", rates, _UNIT, f"candidates from five sources, {_ACTIVITY:,} events of activity")
    for step in _STEPS:
        report.add(f"adapt.ranked.{step}_us", spent[step] * 1e6 / (asked.users * (asked.repeats + 1)), "us/user")
    rates = bench.rate(lambda: bench.one_by_one(asked.single))
    report.add_median("adapt.ranked_one_by_one", rates, _UNIT, f"{asked.single:,} users, one a call")
    report.add_median("adapt.solve_only", bench.rate(bench.solve_only()), _UNIT, f"{asked.examples} examples a user")
    report.add_median("adapt.score_only", bench.rate(bench.score_only(top)), _UNIT, f"top {top} of {asked.items:,}")


def random_sets(users: int, examples: int, catalogue: int) -> SupportSets:
    """Sets of `examples` clicks each; item numbers from 1 on, as the database gives them."""
    rng = np.random.default_rng(0)
    flat = np.empty(users * examples, EXAMPLE)
    ages = np.sort(rng.integers(0, 86_400_000, (users, examples)), axis=1)[:, ::-1]
    flat["time"] = (_NEWEST_MS - ages).ravel()
    flat["hash"] = rng.integers(-(2**63), 2**63, len(flat), dtype=np.int64)
    flat["item"] = rng.integers(1, catalogue + 1, len(flat))
    flat["weight"], flat["type"] = 1.0, 1
    return SupportSets(np.arange(users + 1, dtype=np.int64) * examples, flat)


def _random_activity(first: int, items: int) -> Activity:
    """`_AT_ONCE` events a second apart, on items by Zipf's law, each after three others."""
    rng = np.random.default_rng(first)
    told = np.zeros(_AT_ONCE, ACTIVITY)
    told["time"] = _NEWEST_MS - 1000 * (_ACTIVITY - first - np.arange(_AT_ONCE))
    told["item"] = 1 + rng.zipf(1.2, _AT_ONCE) % items
    told["previous"] = 1 + rng.zipf(1.2, (_AT_ONCE, PREVIOUS)) % items
    return told


def _part(sets: SupportSets, first: int) -> SupportSets:
    """Up to 1,024 tasks from `first` on."""
    starts = sets.starts[first : first + _AT_ONCE + 1]
    return SupportSets(starts - starts[0], sets.examples[starts[0] : starts[-1]])


def fill(engine: Engine, users: list[str], sets: SupportSets, release: Release, folder: Path) -> None:
    """Put users, items (numbered in the release's order) and the release into the database."""
    location = save(release, folder)
    names = text("INSERT INTO items (item_id) SELECT 'item-' || n FROM generate_series(0, :last) AS n ORDER BY n")
    with transaction(engine) as connection:
        connection.execute(names, {"last": len(release.item_ids) - 1})
        if items.items_after(connection, 0)[0] != (1, release.item_ids[0], None):
            raise SystemExit("The database numbers items otherwise than this benchmark expects.")
        releases.register(connection, release.version, msgspec.json.decode(location.read_bytes()), str(location))
    width = len(sets.examples) // len(users)
    for first in range(0, len(users), _WRITTEN_AT_ONCE):
        names_here = users[first : first + _WRITTEN_AT_ONCE]
        starts = np.arange(len(names_here) + 1, dtype=np.int64) * width
        examples = sets.examples[first * width : (first + len(names_here)) * width]
        with transaction(engine) as connection:
            support_sets.write(
                connection, names_here, SupportSets(starts, examples), np.ones(len(names_here), np.int64)
            )


def _seconds() -> dict[str, float]:
    """The product's metric: seconds spent in each step so far."""
    return {step: REGISTRY.get_sample_value("innerloop_step_seconds_sum", {"step": step}) or 0.0 for step in _STEPS}


def _lists(records: dict[str, bytes]) -> dict[str, tuple[list[str], list[float]]]:
    decode = msgspec.json.Decoder(RecommendationScores).decode
    found = {user: decode(record) for user, record in records.items()}
    return {user: ([i.item_id for i in r.items], [i.score for i in r.items]) for user, r in found.items()}


def _require_right(bench: Bench, lists: dict[str, tuple[list[str], list[float]]], top: int) -> None:
    """Every user answered, lists whole and in order, and a sample as the formula has it."""
    if set(lists) != set(bench.users):
        raise SystemExit(f"{len(lists)} of {len(bench.users)} users were answered.")
    if any(len(names) != top or scores != sorted(scores, reverse=True) for names, scores in lists.values()):
        raise SystemExit(f"A list does not hold {top} items in falling order.")
    for user in range(0, len(bench.users), max(1, len(bench.users) // _SAMPLE)):
        expected = _scores(bench, user)
        names, scores = lists[bench.users[user]]
        best = np.sort(expected)[::-1][:top]
        own = expected[[int(name.removeprefix("item-")) for name in names]]
        if max(np.abs(best - scores).max(), np.abs(own - scores).max()) > _TOLERANCE:
            raise SystemExit(f"The list of {bench.users[user]} is not what the formula gives.")


def _scores(bench: Bench, user: int) -> np.ndarray:
    """All items' scores for one user in float64: w = m + inverse(A + X'WX) X'W (y - Xm), inverse(A) = RR'."""
    head = bench.release.head
    if not isinstance(head, BayesHead):
        raise SystemExit("The sample is checked for the default head only.")
    vectors = bench.release.item_vectors.double().numpy()
    mean, root = head.mean.double().numpy(), head.root.double().numpy()
    examples = bench.sets.examples[bench.sets.starts[user] : bench.sets.starts[user + 1]]
    features = vectors[examples["item"] - 1]
    ages = (examples["time"].max() - examples["time"]) / 1000.0
    weights = examples["weight"] * 2.0 ** (-ages / head.half_life) / head.noise
    precision = np.linalg.inv(root @ root.T) + features.T @ (features * weights[:, None])
    scores: np.ndarray = vectors @ (mean + np.linalg.solve(precision, features.T @ (weights * (1.0 - features @ mean))))
    return scores


def _require_equal(
    batched: dict[str, tuple[list[str], list[float]]], single: dict[str, tuple[list[str], list[float]]], count: int
) -> None:
    if len(single) != count:
        raise SystemExit(f"One by one, {len(single)} of {count} users were answered.")
    for user, (_, scores) in single.items():
        if np.abs(np.subtract(batched[user][1], scores)).max() > _TOLERANCE:
            raise SystemExit(f"{user} has other scores when adapted alone.")


if __name__ == "__main__":
    sys.exit(main())
