"""What the processes say of themselves: their /metrics read together, as Prometheus would."""

import math
import socket
import urllib.request
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

_SECONDS = 1.0
_LATENCY = "innerloop_event_to_score_seconds_bucket"


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
    except OSError:
        return [target]
    return sorted({f"[{a[4][0]}]:{port}" if a[0] == socket.AF_INET6 else f"{a[4][0]}:{port}" for a in found})


def answers(url: str) -> bool:
    """Whether a probe is green."""
    try:
        with urllib.request.urlopen(url, timeout=_SECONDS) as answer:  # noqa: S310 - http, and our own
            return bool(answer.status == 200)  # noqa: PLR2004 - OK
    except OSError:
        return False


def _scrape(target: str) -> Scraped:
    try:
        with urllib.request.urlopen(f"http://{target}/metrics", timeout=_SECONDS) as answer:
            text = answer.read().decode()
    except OSError:  # it is being started, or is gone: that is what there is to show
        return Scraped(target, up=False, values={})
    samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return Scraped(target, up=True, values={(s.name, tuple(sorted(s.labels.items()))): s.value for s in samples})


class Latency:
    """Percentiles of event to score between two looks, over all processes."""

    def __init__(self) -> None:
        self._before: dict[str, dict[float, float]] = {}

    def since(self, processes: Iterable[Scraped], *shares: float) -> list[float]:
        """Seconds below which each share of the events since the last look was answered; NaN when there were none.

        Interpolated inside a bucket as Prometheus's `histogram_quantile` does.
        """
        grown: dict[float, float] = {}
        for process in processes:
            now = _buckets(process)
            before = self._before.get(process.target, {})
            if any(now.get(bound, 0.0) < count for bound, count in before.items()):
                before = {}  # started anew
            for bound, count in now.items():
                grown[bound] = grown.get(bound, 0.0) + count - before.get(bound, 0.0)
            if now:
                self._before[process.target] = now
        return [quantile(grown, share) for share in shares]


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


def _buckets(process: Scraped) -> dict[float, float]:
    return {float(dict(labels)["le"]): value for (name, labels), value in process.values.items() if name == _LATENCY}
