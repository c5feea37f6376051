"""Adapt: requests in, score records out. Reads support sets, solves every user of the batch at once, scores.

The order of every batch:
1. keep the newest request per user: the deeper the lag, the fewer adaptations per event
2. read those users' support sets, which are at least as new as the versions asked for, and, where the release has a
   click head and there are ads, what they were shown
3. solve, score, produce; a tombstone for whoever has no set
4. flush, with nothing undelivered
5. the loop commits the offsets

Killed anywhere before 5, the requests are read again and the scores published again: a record says which state it was
computed from, and of two records of a user the higher (model_version, support_version) holds.
"""

import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import msgspec
import numpy as np
import structlog
import torch
from numpy.typing import NDArray

from innerloop import metrics
from innerloop.config import Settings
from innerloop.errors import RetryError, ServiceError, SettingsError, StopError
from innerloop.holdout import in_hold_out
from innerloop.learning.ad_scorer import AdLists
from innerloop.learning.releases import Release, load
from innerloop.learning.scorer import Scorer
from innerloop.scores import AdaptationRequest, AdScores, RecommendationScores, ScoredAd, ScoredItem
from innerloop.store import items, releases, support_sets
from innerloop.store.activity import ActivityReader
from innerloop.store.database import Database, Transaction, transaction
from innerloop.store.ledger import Ledger
from innerloop.streams.batch import Batch
from innerloop.streams.partitions import Partition
from innerloop.streams.processor import LogEnds
from innerloop.streams.publisher import Publisher, partition_of
from innerloop.streams.watch import OutputWatch, Stranger, add_strangers, owner_headers
from innerloop.support import Ints, SupportSets, emptied, gather
from innerloop.tracing import NOT_TRACED, Spans, Traces

_LOG = structlog.get_logger(__name__)
_FLUSH_SECONDS = 5.0
_TASKS_AT_ONCE = 1024
_USERS_AT_ONCE = 10_000
_DIGITS, _PRODUCT_DIGITS = 6, 9  # of published scores; a product of two small probabilities is smaller still
_NUMBERS_BACK = 4 * items.NUMBERS_AT_ONCE


@dataclass(frozen=True)
class _Stored:
    """What is stored of some users: those that have a set, their sets, versions [T] and impressions."""

    users: list[str]
    sets: SupportSets
    versions: Ints
    shown: SupportSets | None


@dataclass(frozen=True)
class _Scored:
    """Best items [T, k] and ads [T, a] of the tasks of one chunk, with their scores."""

    items: list[list[int]]
    item_scores: list[list[float]]
    ads: list[list[ScoredAd]]
    held: list[bool]
    """Whether the task is in the hold-out: then its lists are those of a user of whom nothing is known."""


class Adapt:
    """The processor behind `innerloop adapt`; see the module for its order, `streams.processor` for its contract."""

    def __init__(
        self,
        settings: Settings,
        engine: Database,
        ledger: Ledger,
        publisher: Publisher,
        watch: OutputWatch,
        *,
        device: str = "cpu",
        traces: Traces | None = None,
    ) -> None:
        self._settings, self._engine, self._ledger = settings, engine, ledger
        self._publisher, self._watch = publisher, watch
        self._device = torch.device(device)
        self._traces = traces or Traces()
        self._decode = msgspec.json.Decoder(AdaptationRequest).decode
        self._encode = msgspec.json.Encoder().encode
        self._epochs: dict[int, int] = {}
        self._strangers: dict[str, Stranger] = {}
        self._unknown: set[int] = set()
        """Partitions of which requests may be gone, nobody knows which."""
        self._refreshed_at = 0.0
        self._refused: tuple[int, str] | None = None
        self._advertised = False
        """Whether there was ever an ad: then an empty list goes out where none is left, or the last would stay."""
        self._scorer = Scorer(self._newest_release(), self._device, index_above=settings.adapt.index_above)
        metrics.MODEL_VERSION.set(self._scorer.catalogue.release.version)
        self._activity = ActivityReader(settings.trends.kept_events)
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self._refresh()
        self._score(SupportSets.empty(1), [True])  # the first solve of a process is slow, and nobody should wait for it

    # --- the loop's contract

    def assigned(self, committed: Mapping[Partition, int | None], log_ends: LogEnds) -> Mapping[Partition, int | None]:
        """Claim for an epoch of our own, and watch the outputs that belong to these partitions.

        Never with an older release than there is: the last owner may have published with that, and readers would keep
        its lists whatever came after. Raises RetryError when it cannot be read here.
        """
        self._renew()
        if self._refused is not None:
            version, why = self._refused
            raise RetryError(
                f"Release {version} cannot be read here ({why}) and whoever had these partitions may have used it: "
                "mend it, or train again"
            )
        claims = self._ledger.claim(list(committed))
        numbers = [partition for _, partition in committed]
        self._watch.stop(numbers)
        self._watch.start(numbers)
        self._epochs.update({partition: claim.epoch for (_, partition), claim in claims.items()})
        # Nobody knows what was answered, and retention may have passed requests: the rest of the log does not tell.
        new = (partition for partition, offset in committed.items() if offset is None and log_ends(partition)[0] > 0)
        self._unknown.update(number for _, number in new)
        return dict(committed)

    def stands_at(self, partition: Partition) -> int | None:  # noqa: ARG002
        """Nothing is stored here."""
        return None

    def revoked(self, partitions: Sequence[Partition]) -> None:
        self._ledger.release(partitions)
        for _, partition in partitions:
            self._epochs.pop(partition, None)
            self._unknown.discard(partition)
        self._watch.stop([partition for _, partition in partitions])
        self._strangers = {user: each for user, each in self._strangers.items() if each.partition in self._epochs}

    def gap(self, partition: Partition, from_offset: int, to_offset: int) -> None:
        """Ask again for all users of the partition, whoever's requests are gone; record the gap. Raises RetryError."""
        self._ask_for_all({partition[1]})
        self._ledger.gap(partition, from_offset, to_offset)

    def idle(self) -> None:
        """Look for new items, ads and releases, and answer strangers' records. Raises RetryError."""
        if time.monotonic() - self._refreshed_at > self._settings.adapt.refresh_seconds:
            self._refresh()
        self._ask_where_unknown()
        add_strangers(self._strangers, self._watch.strangers(self._epochs).items())
        if self._strangers:
            self._renew()  # a stranger may have used a newer release, and an older answer would not count
            self._publisher.flush(0)  # what an earlier try left behind goes first, or this waits again
            self._answer(self._stale(self._strangers))
            self._strangers = {}
        self._watch.commit()

    def handle(self, batch: Batch) -> None:
        """Adapt and publish every user asked for. Raises RetryError and StopError."""
        self._publisher.flush(0)  # what an earlier try left behind goes first, or this waits again
        self._ask_where_unknown()
        requests, erased, appended = self._newest(batch)
        with self._traces.spans("innerloop.adapt", batch.trace_parents, len(batch)) as spans:
            self._adapt(requests, erased, spans)
        # Only now: a batch that is tried again counts once.
        metrics.BATCH_SIZE.observe(len(batch))
        metrics.REQUESTS.labels("polled").inc(len(batch))
        metrics.REQUESTS.labels("coalesced").inc(len(batch) - len(requests))
        metrics.observe_since(metrics.REQUEST_TO_SCORE, batch.appended_ms)
        now = time.time()
        for milliseconds in appended:  # those that were coalesced, too: the list published answers all of them
            metrics.EVENT_TO_SCORE.observe(max(0.0, now - milliseconds / 1000))

    # --- where requests are missing

    def _ask_where_unknown(self) -> None:
        """Before any offset of such a partition is committed: who dies here is followed by one that asks as well."""
        if self._unknown:
            self._ask_for_all(self._unknown)
            self._unknown.clear()

    def _ask_for_all(self, numbers: Collection[int]) -> None:
        """Send a request for every user whose requests lie on these partitions. Raises RetryError."""
        self._publisher.flush(0)
        topic, asked, last = self._settings.topics.requests, 0, ""
        count, now = self._publisher.partitions(topic), int(time.time() * 1000)
        while True:
            with transaction(self._engine) as connection:
                users = support_sets.users_after(connection, last, _USERS_AT_ONCE)
            if not users:
                break
            for user, version, newest in users:
                if (number := partition_of(user, count)) in numbers:
                    request = self._encode(AdaptationRequest(user, version, newest, now))
                    self._publisher.send(topic, user, request, partition=number)
                    asked += 1
            self._publisher.flush(_FLUSH_SECONDS)
            last = users[-1][0]
        _LOG.warning("requests are missing, all users asked for", partitions=sorted(numbers), users=asked)

    # --- what strangers wrote

    def _stale(self, strangers: Mapping[str, Stranger]) -> dict[str, int]:
        """User -> partition of those of whom not all that strangers wrote is of the newest state."""
        with transaction(self._engine) as connection:
            stored = support_sets.versions(connection, list(strangers))
        release = self._scorer.catalogue.release.version
        return {
            user: each.partition for user, each in strangers.items() if each.order != (release, stored.get(user, -1))
        }

    def _answer(self, users: Mapping[str, int]) -> None:
        if users:
            self._adapt(users)
            metrics.REPAIRS.inc(len(users))
            _LOG.warning("strangers' records answered", users=len(users))

    # --- step 1

    def _newest(self, batch: Batch) -> tuple[dict[str, int], set[str], list[int]]:
        """User -> partition, each user once: which version was asked for no longer matters, the newest is read.

        And who of them was erased; and when the events of each request were put on their topic (epoch ms), where it
        says so.
        """
        found, erased, appended = {}, set(), []
        for value, (_, partition) in zip(batch.values, batch.partitions, strict=True):
            try:
                request = self._decode(value or b"")
            except msgspec.MsgspecError as error:
                raise StopError(
                    f"{self._settings.topics.requests} holds a record that is no request ({error}): only innerloop"
                    " writes there; find out who else does."
                ) from None
            found[request.user_id] = partition
            if request.erased:
                erased.add(request.user_id)
            if request.appended_at:
                appended.append(request.appended_at)
        return found, erased, appended

    # --- steps 2 to 4

    def _adapt(self, partitions: Mapping[str, int], erased: Collection[str] = (), spans: Spans = NOT_TRACED) -> None:
        began = time.monotonic()
        share, adapted, sent = self._settings.quality.hold_out, 0, 0
        for asked, stored in self._read_ahead(list(partitions)):
            self._bury({*erased} & {*asked} | {*asked} - {*stored.users}, partitions)
            self._know_items_of(stored.sets)
            held = [in_hold_out(user, share) for user in stored.users]
            scored = self._score(stored.sets, held, stored.shown)
            sent += self._publish(stored, scored, partitions, spans=spans)
            adapted += len(stored.users)
        with metrics.STEP_SECONDS.labels("publish").time():
            self._publisher.flush(_FLUSH_SECONDS)
        metrics.SCORES.labels("recommendations").inc(sent)
        metrics.SCORES.labels("ads").inc(sent if self._advertised else 0)
        metrics.ADAPTED.inc(adapted)
        metrics.ADAPTATION_SECONDS.inc(time.monotonic() - began)

    def _read_ahead(self, users: list[str]) -> Iterator[tuple[list[str], _Stored]]:
        """Some of `users` at a time and what is stored of them; the next are read while these are worked on."""
        chunks = [users[first : first + _TASKS_AT_ONCE] for first in range(0, len(users), _TASKS_AT_ONCE)]
        ahead: Future[_Stored] | None = None
        for number, chunk in enumerate(chunks, 1):
            stored = ahead.result() if ahead else self._read(chunk)
            ahead = self._ahead.submit(self._read, chunks[number]) if number < len(chunks) else None
            yield chunk, stored

    def _read(self, users: list[str]) -> _Stored:
        with metrics.STEP_SECONDS.labels("read").time(), transaction(self._engine) as connection:
            found, sets, versions = support_sets.read(connection, users)
            return _Stored(found, sets, versions, self._read_shown(connection, found))

    def _read_shown(self, connection: Transaction, users: list[str]) -> SupportSets | None:
        """The users' impressions, where the ads' scores depend on them."""
        if not self._scorer.ads_by_click or not self._scorer.catalogue.ad_ids:
            return None
        found, sets, _ = support_sets.read(connection, users, table="impressions")
        rows = {user: row for row, user in enumerate(found)}
        with_nobody = SupportSets(np.append(sets.starts, sets.starts[-1]), sets.examples)
        return gather(with_nobody, np.array([rows.get(user, len(found)) for user in users], np.int64))

    def _know_items_of(self, sets: SupportSets) -> None:
        numbers = sets.examples["item"]
        if (self._scorer.catalogue.places(numbers) < 0).any():
            with metrics.STEP_SECONDS.labels("read").time(), transaction(self._engine) as connection:
                self._know(connection, numbers)

    def _know(self, connection: Transaction, numbers: NDArray[np.integer]) -> None:
        """Take those of the items into the catalogue that it lacks."""
        catalogue = self._scorer.catalogue
        unknown = np.unique(numbers[catalogue.places(numbers) < 0])
        if len(unknown):
            catalogue.add(items.items_numbered(connection, unknown.tolist()))

    def _score(self, sets: SupportSets, held: list[bool], shown: SupportSets | None = None) -> _Scored:
        """The hold-out is scored as users of whom nothing is known; items seen are left out as for the others."""
        scorer, top = self._scorer, self._settings.adapt.top
        seen = sets if self._settings.adapt.exclude_seen else None
        if any(held):
            sets, shown = emptied(sets, held), None if shown is None else emptied(shown, held)
        best = scorer.lists(sets, top, seen=seen)
        ads = self._named(scorer.ad_lists(sets, top, shown))
        return _Scored(best.places.tolist(), _rounded(best.scores), ads, held)

    def _named(self, found: AdLists) -> list[list[ScoredAd]]:
        """The lists as they are published."""
        ids, its_items = self._scorer.catalogue.ad_ids, self._scorer.catalogue.ad_items
        columns = [
            found.numbers.tolist(),
            _rounded(found.scores, _PRODUCT_DIGITS if found.click is not None else _DIGITS),
        ]
        columns += [_rounded(part) for part in (found.click, found.purchase_given_click) if part is not None]
        rows = zip(*columns, strict=True)
        return [[ScoredAd(ids[at], its_items[at], *chances) for at, *chances in zip(*row, strict=True)] for row in rows]

    def _publish(
        self, stored: _Stored, scored: _Scored, partitions: Mapping[str, int], *, spans: Spans = NOT_TRACED
    ) -> int:
        """Send the lists; of how many users."""
        catalogue, topics, encode = self._scorer.catalogue, self._settings.topics, self._encode
        version, method = catalogue.release.version, self._scorer.method
        names = catalogue.item_ids
        headers = {partition: owner_headers(epoch) for partition, epoch in self._epochs.items()}
        now, sent = int(time.time() * 1000), 0
        sets, versions = stored.sets, stored.versions.tolist()
        facts = zip(stored.users, versions, sets.sizes.tolist(), sets.newest.tolist(), strict=True)
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
                    "method": "none" if scored.held[row] else method,
                    "arm": "hold_out" if scored.held[row] else "adapted",
                }
                partition = partitions[user]
                mark = headers.get(partition)
                if mark is None:
                    continue  # revoked while this batch waited for the database: its new owner answers
                mark = [*mark, *spans.headers(user)]
                pairs = zip(scored.items[row], scored.item_scores[row], strict=True)
                listed = [ScoredItem(names[place], score) for place, score in pairs if place >= 0]
                record = encode(RecommendationScores(model="recommendations", items=listed, **common))
                self._publisher.send(topics.recommendations, user, record, headers=mark, partition=partition)
                if self._advertised:
                    record = encode(AdScores(model="ads", ads=scored.ads[row], kind=self._scorer.ads_kind, **common))
                    self._publisher.send(topics.ads, user, record, headers=mark, partition=partition)
                sent += 1
        return sent

    def _bury(self, users: Iterable[str], partitions: Mapping[str, int]) -> None:
        """A tombstone on every score topic for who was erased or has no set: what was computed of it must not stay."""
        outputs = (self._settings.topics.recommendations, self._settings.topics.ads)
        for user in users:
            epoch = self._epochs.get(partitions[user])
            if epoch is None:
                continue  # revoked meanwhile: its new owner answers
            for topic in outputs:
                self._publisher.send(topic, user, None, headers=owner_headers(epoch), partition=partitions[user])

    # --- what is scored with, and over

    def _newest_release(self) -> Release:
        """The newest release. Raises ServiceError without one, SettingsError when it is damaged."""
        with transaction(self._engine) as connection:
            registered = releases.newest(connection)
        if registered is None:
            raise ServiceError("There is no release to score with: run `innerloop train`.")
        release = load(registered.location, registered.card)
        if release.version != registered.version:
            raise SettingsError(
                f"{registered.location} is release {release.version}, registered as {registered.version}: train again."
            )
        _LOG.info("release loaded", version=release.version, method=release.head.name, items=len(release.item_ids))
        return release

    def _renew(self) -> None:
        """A newer release replaces the one in use, an unreadable one leaves it in use."""
        with transaction(self._engine) as connection:
            newest = releases.newest(connection)
        if newest is None or newest.version <= self._scorer.catalogue.release.version:
            self._refused = None
            return
        try:
            self._scorer.use(self._newest_release())
            metrics.MODEL_VERSION.set(newest.version)
            self._refused = None
        except SettingsError as error:
            if self._refused != (refused := (newest.version, str(error))):  # tried again each time, told once
                _LOG.error("newer release refused, the old one stays in use", why=str(error))
            self._refused = refused

    def _refresh(self) -> None:
        """New items, ads and activity, and a newer release."""
        self._renew()
        catalogue = self._scorer.catalogue
        # Of one moment: an ad, or activity, of an item that came after the items were read would be dropped.
        with transaction(self._engine, of_one_moment=True) as connection:
            found = items.items_after(connection, catalogue.read_up_to - _NUMBERS_BACK)
            catalogue.add(found)
            catalogue.read_up_to = found[-1][0] if found else catalogue.read_up_to
            ads = items.active_ads(connection, self._settings.adapt.ad_active_days)
            self._advertised = items.any_ads(connection)
            told = self._activity.read(connection)  # last: what is read here is not read again
            # Whoever drew a number and was held up before the commit may come later than we look back.
            advertised = np.array([number for _, number in ads], np.int64)
            numbers = np.concatenate([told["item"], told["previous"].ravel(), advertised])
            self._know(connection, numbers[numbers >= 0])
        catalogue.set_ads(ads)
        with metrics.STEP_SECONDS.labels("trends").time():
            self._scorer.observe(told)
        self._refreshed_at = time.monotonic()  # at the end: what failed is tried again at once


def _rounded(scores: NDArray[np.float32], digits: int = _DIGITS) -> list[list[float]]:
    """Six digits are all that float32 scores mean; more would only make records longer."""
    rows: list[list[float]] = np.round(scores.astype(np.float64), digits).tolist()
    return rows
