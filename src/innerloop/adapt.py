"""Adapt: requests in, score records out. Reads support sets, solves every user of the batch at once, scores.

The order of every batch:
1. keep the newest request per user: the deeper the lag, the fewer adaptations per event
2. read those users' support sets, which are at least as new as the versions asked for
3. solve, score, produce
4. flush, with nothing undelivered
5. the loop commits the offsets

Killed anywhere before 5, the requests are read again and the scores published again: a record says which state it was
computed from, and of two records of a user the higher (model_version, support_version) holds.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import structlog
import torch
from numpy.typing import NDArray

from innerloop import metrics
from innerloop.config import Settings
from innerloop.errors import ServiceError, SettingsError, StopError
from innerloop.learning.releases import Release, load
from innerloop.learning.scorer import Scorer
from innerloop.scores import AdaptationRequest, AdScores, RecommendationScores, ScoredAd, ScoredItem
from innerloop.store import items, releases, support_sets
from innerloop.store.activity import ActivityReader
from innerloop.store.database import Database, transaction
from innerloop.store.ledger import Ledger
from innerloop.streams.batch import Batch, Partition
from innerloop.streams.publisher import Publisher
from innerloop.streams.watch import OutputWatch, owner_headers
from innerloop.support import Ints, SupportSets

_LOG = structlog.get_logger(__name__)
_FLUSH_SECONDS = 5.0
_TASKS_AT_ONCE = 1024
_NUMBERS_BACK = 4 * items.NUMBERS_AT_ONCE


@dataclass(frozen=True)
class _Scored:
    """Best items [T, k] and ads [T, a] of the tasks of one chunk, with their scores."""

    items: list[list[int]]
    item_scores: list[list[float]]
    ads: list[list[int]]
    ad_scores: list[list[float]]


class Adapt:
    """The processor behind `innerloop adapt`; see the module for its order and `streams.loop` for its contract."""

    def __init__(
        self,
        settings: Settings,
        engine: Database,
        ledger: Ledger,
        publisher: Publisher,
        watch: OutputWatch,
        *,
        device: str = "cpu",
    ) -> None:
        self._settings, self._engine, self._ledger = settings, engine, ledger
        self._publisher, self._watch = publisher, watch
        self._device = torch.device(device)
        self._decode = msgspec.json.Decoder(AdaptationRequest).decode
        self._encode = msgspec.json.Encoder().encode
        self._epochs: dict[int, int] = {}
        self._strangers: dict[str, int] = {}
        self._refreshed_at = 0.0
        self._scorer = Scorer(self._newest_release(), self._device, index_above=settings.adapt.index_above)
        self._activity = ActivityReader(settings.trends.kept_events)
        self._refresh()
        self._score(SupportSets.empty(1))  # the first solve of a process is slow, and nobody should wait for it

    # --- the loop's contract

    def assigned(self, committed: Mapping[Partition, int | None]) -> Mapping[Partition, int | None]:
        """Claim for an epoch of our own, and watch the outputs that belong to these partitions."""
        claims = self._ledger.claim(list(committed))
        numbers = [partition for _, partition in committed]
        self._watch.stop(numbers)
        self._watch.start(numbers)
        self._epochs.update({partition: claim.epoch for (_, partition), claim in claims.items()})
        return dict(committed)

    def revoked(self, partitions: Sequence[Partition]) -> None:
        self._ledger.release(partitions)
        for _, partition in partitions:
            self._epochs.pop(partition, None)
        self._watch.stop([partition for _, partition in partitions])
        self._strangers = {user: at for user, at in self._strangers.items() if at in self._epochs}

    def idle(self) -> None:
        """Look for new items, ads and releases, and answer strangers' records. Raises RetryError."""
        if time.monotonic() - self._refreshed_at > self._settings.adapt.refresh_seconds:
            self._refresh()
        self._strangers.update(self._watch.strangers(self._epochs))
        if self._strangers:
            metrics.REPAIRS.inc(len(self._strangers))
            _LOG.warning("strangers' records answered", users=len(self._strangers))
            self._adapt(self._strangers)
            self._strangers = {}
        self._watch.commit()

    def handle(self, batch: Batch) -> None:
        """Adapt and publish every user asked for. Raises RetryError and StopError."""
        self._publisher.flush(0)  # what an earlier try left behind goes first, or this waits again
        metrics.BATCH_SIZE.observe(len(batch))
        requests = self._newest(batch)
        metrics.REQUESTS.labels("polled").inc(len(batch))
        metrics.REQUESTS.labels("coalesced").inc(len(batch) - len(requests))
        self._adapt(requests)

    # --- step 1

    def _newest(self, batch: Batch) -> dict[str, int]:
        """User -> partition, each user once: which version was asked for no longer matters, the newest is read."""
        found = {}
        for value, (_, partition) in zip(batch.values, batch.partitions, strict=True):
            try:
                found[self._decode(value or b"").user_id] = partition
            except msgspec.MsgspecError as error:
                raise StopError(
                    f"{self._settings.topics.requests} holds a record that is no request ({error}): only innerloop"
                    " writes there; find out who else does."
                ) from None
        return found

    # --- steps 2 to 4

    def _adapt(self, partitions: Mapping[str, int]) -> None:
        users, sets, versions = self._read(list(partitions))
        for first in range(0, len(users), _TASKS_AT_ONCE):
            some = slice(first, min(first + _TASKS_AT_ONCE, len(users)))
            chunk = SupportSets(
                sets.starts[some.start : some.stop + 1] - sets.starts[some.start],
                sets.examples[sets.starts[some.start] : sets.starts[some.stop]],
            )
            scored = self._score(chunk)
            self._publish(users[some], chunk, versions[some], scored, partitions)
        with metrics.STEP_SECONDS.labels("publish").time():
            self._publisher.flush(_FLUSH_SECONDS)
        metrics.ADAPTED.inc(len(users))

    def _read(self, users: list[str]) -> tuple[list[str], SupportSets, Ints]:
        with metrics.STEP_SECONDS.labels("read").time(), transaction(self._engine) as connection:
            names, sets, versions = support_sets.read(connection, users)
            catalogue = self._scorer.catalogue
            unknown = np.unique(sets.examples["item"][catalogue.places(sets.examples["item"]) < 0])
            if len(unknown):
                catalogue.add(items.items_numbered(connection, unknown.tolist()))
        return names, sets, versions

    def _score(self, sets: SupportSets) -> _Scored:
        scorer, top = self._scorer, self._settings.adapt.top
        best = scorer.lists(sets, top, exclude_seen=self._settings.adapt.exclude_seen)
        ads, ad_scores = scorer.ads(sets, top)
        return _Scored(best.places.tolist(), _rounded(best.scores), ads.tolist(), _rounded(ad_scores))

    def _publish(
        self, users: list[str], sets: SupportSets, versions: Ints, scored: _Scored, partitions: Mapping[str, int]
    ) -> None:
        catalogue, topics, encode = self._scorer.catalogue, self._settings.topics, self._encode
        version, method = catalogue.release.version, self._scorer.method
        names, ad_ids, ad_items = catalogue.item_ids, catalogue.ad_ids, catalogue.ad_items
        headers = {partition: owner_headers(epoch) for partition, epoch in self._epochs.items()}
        now = int(time.time() * 1000)
        facts = zip(users, versions.tolist(), sets.sizes.tolist(), sets.newest.tolist(), strict=True)
        with metrics.STEP_SECONDS.labels("encode").time():
            for row, (user, support_version, size, newest) in enumerate(facts):
                common = {
                    "user_id": user,
                    "model_version": version,
                    "support_version": support_version,
                    "support_size": size,
                    "trends_version": self._activity.newest,
                    "event_time": newest,
                    "scored_at": now,
                    "method": method,
                }
                partition = partitions[user]
                mark = headers.get(partition)
                if mark is None:
                    continue  # revoked while this batch waited for the database: its new owner answers
                pairs = zip(scored.items[row], scored.item_scores[row], strict=True)
                listed = [ScoredItem(names[place], score) for place, score in pairs if place >= 0]
                record = encode(RecommendationScores(model="recommendations", items=listed, **common))
                self._publisher.send(topics.recommendations, user, record, headers=mark, partition=partition)
                if ad_ids:
                    ads = zip(scored.ads[row], scored.ad_scores[row], strict=True)
                    shown = [ScoredAd(ad_ids[place], ad_items[place], score) for place, score in ads]
                    record = encode(AdScores(model="ads", ads=shown, kind=self._scorer.ads_kind, **common))
                    self._publisher.send(topics.ads, user, record, headers=mark, partition=partition)
        metrics.SCORES.labels("recommendations").inc(len(users))
        metrics.SCORES.labels("ads").inc(len(users) if ad_ids else 0)

    # --- what is scored with, and over

    def _newest_release(self) -> Release:
        """The newest release. Raises ServiceError without one, SettingsError when it is damaged."""
        with transaction(self._engine) as connection:
            registered = releases.newest(connection)
        if registered is None:
            raise ServiceError("There is no release to score with: run `innerloop train`.")
        release = load(registered.location)
        if release.version != registered.version:
            raise SettingsError(
                f"{registered.location} is release {release.version}, registered as {registered.version}: train again."
            )
        _LOG.info("release loaded", version=release.version, method=release.head.name, items=len(release.item_ids))
        return release

    def _refresh(self) -> None:
        """New items, ads and activity; a newer release replaces the one in use, an unreadable one leaves it in use."""
        self._refreshed_at = time.monotonic()
        with transaction(self._engine) as connection:
            newest = releases.newest(connection)
        if newest is not None and newest.version > self._scorer.catalogue.release.version:
            try:
                self._scorer.use(self._newest_release())
            except SettingsError as error:
                _LOG.error("newer release refused, the old one stays in use", why=str(error))
        catalogue = self._scorer.catalogue
        with transaction(self._engine) as connection:
            found = items.items_after(connection, catalogue.read_up_to - _NUMBERS_BACK)
            catalogue.add(found)
            catalogue.read_up_to = found[-1][0] if found else catalogue.read_up_to
            catalogue.set_ads(items.active_ads(connection, self._settings.adapt.ad_active_days))
            told = self._activity.read(connection)  # last: what is read here is not read again
        with metrics.STEP_SECONDS.labels("trends").time():
            self._scorer.observe(told)


def _rounded(scores: NDArray[np.float32]) -> list[list[float]]:
    """Six digits are all that float32 scores mean; more would only make records longer."""
    rows: list[list[float]] = np.round(scores.astype(np.float64), 6).tolist()
    return rows
