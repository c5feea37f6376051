"""What the processes say of themselves: their /metrics read together, as Prometheus would."""

import math
import socket
import urllib.request
from collections import deque
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPException

from prometheus_client.parser import text_string_to_metric_families

_SECONDS = 1.0
_FAILURES = (OSError, HTTPException, ValueError, OverflowError)
"""It is being started, ends in mid-answer, is somebody else who says something else, or has no such port."""


@dataclass(frozen=True)
class Scraped:
    """One process's samples; none when it did not answer."""

    target: str
    up: bool
    values: Mapping[tuple[str, tuple[tuple[str, str], ...]], float]

    def total(self, name: str) -> float:
        """Sum of a sample over its labels."""
        return sum(value for (known, _), value in self.values.items() if known == name)


def scrape(targets: Iterable[str]) -> list[Scraped]:
    """Read every process, all at once; a name with several addresses stands for several processes."""
    resolved = [each for target in targets for each in _addresses(target)]
    if not resolved:
        return []
    with ThreadPoolExecutor(max_workers=min(16, len(resolved))) as pool:
        return list(pool.map(_scrape, resolved))


def _addresses(target: str) -> list[str]:
    host, _, port = target.rpartition(":")
    try:
        found = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
    except _FAILURES:
        return [target]
    return sorted({f"[{a[4][0]}]:{port}" if a[0] == socket.AF_INET6 else f"{a[4][0]}:{port}" for a in found})


def answers(url: str) -> bool:
    """Whether a probe is green."""
    try:
        with urllib.request.urlopen(url, timeout=_SECONDS) as answer:  # noqa: S310 - http, and our own
            return bool(answer.status == 200)  # noqa: PLR2004 - OK
    except _FAILURES:
        return False


def _scrape(target: str) -> Scraped:
    try:
        with urllib.request.urlopen(f"http://{target}/metrics", timeout=_SECONDS) as answer:
            text = answer.read().decode()
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    except _FAILURES:
        return Scraped(target, up=False, values={})
    return Scraped(target, up=True, values={(s.name, tuple(sorted(s.labels.items()))): s.value for s in samples})


class Latency:
    """Percentiles of one histogram over the last looks, of all processes together."""

    def __init__(self, histogram: str, *, looks: int) -> None:
        self._name = f"{histogram}_bucket"
        self._before: dict[str, dict[float, float]] = {}
        self._grown: deque[dict[float, float]] = deque(maxlen=looks)
        self._looked = False

    def add(self, processes: Iterable[Scraped]) -> None:
        """Take one look in; what was observed before the first one is nobody's minute."""
        grown: dict[float, float] = {}
        for process in processes:
            now = self._buckets(process)
            before = self._before.get(process.target, {} if self._looked else now)
            if any(now.get(bound, 0.0) < count for bound, count in before.items()):
                before = {}  # started anew
            for bound, count in now.items():
                grown[bound] = grown.get(bound, 0.0) + count - before.get(bound, 0.0)
            if now:
                self._before[process.target] = now
        self._grown.append(grown)
        self._looked = True

    def percentiles(self, *shares: float, looks: int | None = None) -> list[float]:
        """Seconds below which each share of the last looks' observations lie, all by default; NaN without any.

        Interpolated inside a bucket as Prometheus's `histogram_quantile` does.
        """
        some = list(self._grown)[-(looks or len(self._grown)) :]
        buckets: dict[float, float] = {}
        for grown in some:
            for bound, count in grown.items():
                buckets[bound] = buckets.get(bound, 0.0) + count
        return [quantile(buckets, share) for share in shares]

    def _buckets(self, process: Scraped) -> dict[float, float]:
        found = process.values.items()
        return {float(dict(labels)["le"]): value for (name, labels), value in found if name == self._name}


def quantile(buckets: Mapping[float, float], share: float) -> float:
    """The value below which `share` of the observations lie, of cumulative counts by upper bound; NaN without any."""
    bounds = sorted(buckets)
    total = buckets[bounds[-1]] if bounds else 0.0
    if total <= 0:
        return math.nan
    wanted, below, last = share * total, 0.0, 0.0
    for bound in bounds:
        if buckets[bound] >= wanted:
            if math.isinf(bound):
                return last
            inside = buckets[bound] - below
            return last + (bound - last) * ((wanted - below) / inside if inside else 1.0)
        below, last = buckets[bound], bound
    return last
