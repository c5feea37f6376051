"""The judge of a run: compares everything that came out with a single-threaded fold of everything that went in.

What it checks, each finding a sentence with the user, place or offset:

- sets: Postgres holds for each user with events exactly the oracle's set (items by name, types, weights, times,
  hashes), and nobody else; the same of impressions, where they were gathered;
- erasures: of whom an erasure names there are a receipt and a request that says so, and nothing that they did up to the
  time on the receipt; of who did nothing later there is no set, and a tombstone is the last record of each score topic;
- accounting: what Postgres holds, what is on the dead-letter topic, and the duplicates and late events that the oracle
  counts are together all that was produced. A dead letter names its record's topic, partition and offset and repeats
  its key, value, headers and reason; every refused record has one and no other has;
- ledger: each partition stands at its end, and each group has committed that far;
- fencing: every move of the ledger was made by the worker that claimed that epoch, and no offset goes back; a claim
  takes the next epoch and leaves the offset as it is;
- requests: the highest version asked for of each user is that of its set, no version was asked for that never was, and
  each lies on the partition of its key;
- scores: see scores.py;
- contents: the last lists of a sample of users are what their release makes of their sets, see contents.py.

Versions are not compared with anything: how many there are depends on the batches.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from innerloop.evaluation.judge.contents import Contents
from innerloop.evaluation.judge.oracle import Example, Oracle, Place, Rules, partition_of
from innerloop.evaluation.judge.scores import Final, ScoreJudge, listed, same_list
from innerloop.scores import AdaptationRequest
from innerloop.store.audit import LedgerRow, StoredSet
from innerloop.streams.batch import Record
from innerloop.streams.partitions import Partition

MOST_FINDINGS = 100
RECOMPUTED_USERS = 500
FATES = ("stored", "duplicate", "too_late", "dead_lettered", "erased", "erasures")
"""What may have become of a record; the last is an erasure itself."""
_HEADER = "__connect.errors."


class LedgerWrite(NamedTuple):
    """One write to a row of the ledger, in the order of the writes, and who made it."""

    topic: str
    partition: int
    epoch: int
    next_offset: int | None
    writer: str


@dataclass(frozen=True)
class Evidence:
    """What a run has left behind. Iterables are read once, in this order."""

    produced: Iterable[Record]
    """Everything on the event topics, impressions included."""
    stored: Iterable[StoredSet]
    ledger: Iterable[LedgerRow]
    dead_letters: Iterable[Record]
    requests: Iterable[Record]
    scores: Mapping[str, Iterable[Record]]
    """By model; leave out one that nobody publishes."""
    requests_topic: str
    partitions: int
    """Of the topics of requests and scores."""
    committed: Mapping[str, Mapping[Partition, tuple[int, int]]] = field(default_factory=dict)
    """By group: where its partitions stand, and where they end."""
    writes: Iterable[LedgerWrite] = ()
    """Every write to the ledger, where a trigger has kept them."""
    contents: Contents | None = None
    """What lists are recomputed from, where they can be."""
    erasures: Iterable[Record] = ()
    """Everything on the erasure topic."""
    shown: Iterable[StoredSet] | None = None
    """The impressions in Postgres."""
    receipts: Callable[[Collection[str]], Mapping[str, int]] = lambda _: {}
    """Of those of some users of whose erasure there is a receipt, up to when (epoch ms) their past is erased."""


@dataclass
class Verdict:
    """What was found, and how many of what there were."""

    findings: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def ok(self) -> bool:
        return not self.findings

    def take(self, findings: Iterable[str]) -> None:
        """Keep the first hundred; a broken loop would fill the memory with the others."""
        for finding in findings:
            self.counts["findings"] += 1
            if len(self.findings) < MOST_FINDINGS:
                self.findings.append(finding)


def judge(evidence: Evidence, rules: Rules) -> Verdict:
    """Judge a run that has settled: no worker is at work any more."""
    verdict, oracle = Verdict(), Oracle(rules)
    for record in evidence.produced:
        oracle.see(record)
    for record in evidence.erasures:
        oracle.see_erasure(record)
    verdict.take(oracle.carry_out(evidence.receipts(oracle.asked)))
    gone = oracle.gone
    verdict.counts.update(oracle.fates())
    verdict.counts["records"] = oracle.records
    verdict.counts["came_back"] = len(oracle.asked) - len(gone)
    finals: dict[str, Final] = {}
    verdict.take(_judged_sets(evidence.stored, oracle, finals, verdict.counts))
    if evidence.shown is not None:
        verdict.take(_judged_sets(evidence.shown, oracle, {}, verdict.counts, shown=True))
    ledger = list(evidence.ledger)
    verdict.take(_judged_ledger(ledger, oracle.ends))
    verdict.take(_judged_commits(evidence.committed))
    verdict.take(judged_writes(evidence.writes))
    verdict.take(_judged_letters(evidence.dead_letters, oracle, verdict.counts))
    verdict.take(_judged_accounts(verdict.counts))
    requests = _judged_requests(evidence, finals, verdict.counts, erased=oracle.asked, gone=gone)
    verdict.take(requests)
    epochs = {row.partition: row.epoch for row in ledger if row.topic == evidence.requests_topic}
    for model, records in evidence.scores.items():
        scores = ScoreJudge(model, epochs, evidence.partitions, erased=oracle.asked, gone=gone)
        verdict.take(_judged_scores(scores, model, records, finals, verdict.counts))
        if evidence.contents is not None:
            verdict.take(
                _judged_contents(scores, model, evidence.contents, finals, oracle=oracle, counts=verdict.counts)
            )
    return verdict


def _judged_sets(
    stored: Iterable[StoredSet],
    oracle: Oracle,
    finals: dict[str, Final],
    counts: Counter[str],
    *,
    shown: bool = False,
) -> Iterator[str]:
    missing, what = set(oracle.users(shown=shown)), "set of impressions" if shown else "support set"
    for user, version, examples in stored:
        if user not in missing:
            yield f"User {user} has a {what} and {'was erased' if user in oracle.asked else 'no events'}."
            continue
        missing.remove(user)
        found: list[Example] = [(each.time, each.hash, each.item, each.type, each.weight) for each in examples]
        finals[user] = Final(version, len(found), found[-1][0] if found else 0)
        wanted = oracle.expected(user, shown=shown)
        counts["stored"] += len(found) if found == wanted else (Counter(found) & Counter(wanted)).total()
        if found != wanted:
            yield f"User {user}'s {what} is not what was produced: {_difference(found, wanted)}."
    for user in sorted(missing):
        yield f"User {user} has {len(oracle.expected(user, shown=shown))} events and no {what}."


def _difference(found: list[Example], wanted: list[Example]) -> str:
    lost, extra = Counter(wanted) - Counter(found), Counter(found) - Counter(wanted)
    if not lost and not extra:
        return "the order is another"
    example = next(iter(lost or extra))
    what = f"{lost.total()} events are missing and {extra.total()} are there that should not be"
    return f"{what}, for one that of {example[2]} at {example[0]}"


def _judged_ledger(rows: Iterable[LedgerRow], ends: Mapping[Partition, int]) -> Iterator[str]:
    stands = {(row.topic, row.partition): row.next_offset for row in rows}
    for (topic, partition), end in sorted(ends.items()):
        if stands.get((topic, partition)) != end:
            yield f"The ledger has {topic}[{partition}] at {stands.get((topic, partition))}, and it ends at {end}."


def _judged_commits(committed: Mapping[str, Mapping[Partition, tuple[int, int]]]) -> Iterator[str]:
    for group, places in committed.items():
        for (topic, partition), (offset, end) in sorted(places.items()):
            if offset != end:
                yield f"Group {group} has committed {offset} of {topic}[{partition}], which ends at {end}."


def judged_writes(writes: Iterable[LedgerWrite]) -> Iterator[str]:
    """Findings about who moved the ledger: the promise that a superseded owner writes nothing."""
    rows: dict[Partition, LedgerWrite] = {}
    claimers: dict[tuple[str, int, int], str] = {}
    for write in writes:
        place = write.topic, write.partition
        before = rows.get(place)
        rows[place] = write
        if before is None or write.epoch != before.epoch:
            claimers[*place, write.epoch] = write.writer
            yield from _judged_claim(write, before)
            continue
        claimer = claimers[*place, write.epoch]
        if write.writer != claimer:
            yield (
                f"{write.writer} moved {write.topic}[{write.partition}] to {write.next_offset} under epoch"
                f" {write.epoch}, which {claimer} had claimed: a superseded owner wrote."
            )
        if write.next_offset is None or (before.next_offset or 0) > write.next_offset:
            yield (
                f"{write.writer} moved {write.topic}[{write.partition}] back from {before.next_offset} to"
                f" {write.next_offset}."
            )


def _judged_claim(write: LedgerWrite, before: LedgerWrite | None) -> Iterator[str]:
    epoch, offset = (before.epoch, before.next_offset) if before else (0, None)
    if write.epoch != epoch + 1:
        yield f"{write.writer} claimed {write.topic}[{write.partition}] with epoch {write.epoch} after {epoch}."
    if write.next_offset != offset:
        yield (
            f"{write.writer} claimed {write.topic}[{write.partition}] and moved it from {offset} to"
            f" {write.next_offset}: a claim moves nothing."
        )


def _judged_accounts(counts: Counter[str]) -> Iterator[str]:
    fates = {fate: counts[fate] for fate in FATES}
    counts["unaccounted"] = counts["records"] - sum(fates.values())
    if counts["unaccounted"]:
        said = ", ".join(f"{count} {fate.replace('_', ' ')}" for fate, count in fates.items())
        yield f"Of {counts['records']} records {counts['unaccounted']} are unaccounted for: {said}."


def _judged_letters(letters: Iterable[Record], oracle: Oracle, counts: Counter[str]) -> Iterator[str]:
    missing = dict(oracle.poison)
    for letter in letters:
        counts["dead_letters"] += 1
        where, place = _where(letter), _place(letter)
        wanted = oracle.poison.get(place) if place else None
        if place is None or wanted is None:
            yield f"{where}: a dead letter of {place}, which is no bad record."
            continue
        counts["dead_letters_repeated" if missing.pop(place, None) is None else "dead_lettered"] += 1
        if (letter.key, letter.value) != (wanted.key, wanted.value):
            yield f"{where}: the dead letter of {place} does not repeat its key and value."
        own, added = letter.headers[: len(wanted.headers)], letter.headers[len(wanted.headers) :]
        if tuple(own) != wanted.headers or not all(name.startswith(_HEADER) for name, _ in added):
            yield f"{where}: the dead letter of {place} does not repeat its headers."
        reason = _said(letter, "exception.class.name").removeprefix("innerloop.")
        if reason != wanted.reason:
            yield f"{where}: the dead letter of {place} says {reason}, and it is {wanted.reason}."
    for topic, partition, offset in sorted(missing):
        yield f"{topic}[{partition}]@{offset} is a bad record and was never dead-lettered."


def _where(record: Record) -> str:
    return f"{record.topic}[{record.partition}]@{record.offset}"


def _place(letter: Record) -> Place | None:
    partition, offset = _said(letter, "partition"), _said(letter, "offset")
    return (_said(letter, "topic"), int(partition), int(offset)) if partition.isdigit() and offset.isdigit() else None


def _said(letter: Record, name: str) -> str:
    return (dict(letter.headers).get(_HEADER + name) or b"").decode()


def _judged_requests(
    evidence: Evidence,
    finals: Mapping[str, Final],
    counts: Counter[str],
    *,
    erased: Collection[str],
    gone: Collection[str],
) -> Iterator[str]:
    """`erased` are all whom erasures name, `gone` those of them who did nothing later."""
    told: set[str] = set()
    highest: dict[str, AdaptationRequest] = {}
    decode = msgspec.json.Decoder(AdaptationRequest).decode
    for record in evidence.requests:
        counts["requests"] += 1
        request = decode(record.value or b"")
        key = request.user_id.encode()
        if record.key != key:
            yield f"{_where(record)}: the key of user {request.user_id}'s request is not theirs."
        if record.partition != (own := partition_of(key, evidence.partitions)):
            yield f"{_where(record)}: user {request.user_id} belongs on partition {own}."
        if request.erased:
            told.add(request.user_id)
        known = highest.get(request.user_id)
        if known is None or request.support_version >= known.support_version:
            highest[request.user_id] = request
    for user in sorted(set(erased) - told):
        yield f"User {user} was erased, and no request says so."
    yield from _judged_highest({user: highest[user] for user in highest.keys() - gone}, finals)


def _judged_highest(highest: dict[str, AdaptationRequest], finals: Mapping[str, Final]) -> Iterator[str]:
    for user, final in finals.items():
        asked = highest.pop(user, None)
        if asked is None or asked.support_version != final.support_version:
            version = asked.support_version if asked else "none"
            yield f"User {user}'s support set is at {final.support_version}, the highest asked for is {version}."
        elif asked.event_time != final.event_time:
            yield f"User {user}'s last request is of events up to {asked.event_time}, not {final.event_time}."
    for user in sorted(highest):
        yield f"User {user} was asked for and has no support set."


def _judged_scores(
    scores: ScoreJudge, model: str, records: Iterable[Record], finals: Mapping[str, Final], counts: Counter[str]
) -> Iterator[str]:
    for record in records:
        yield from scores.see(record)
    yield from scores.final(finals)
    counts[f"{model}"] += scores.records
    counts[f"{model}_repeated"] += scores.repeats
    counts[f"{model}_older_than_the_one_before"] += scores.older


def _judged_contents(
    scores: ScoreJudge,
    model: str,
    contents: Contents,
    finals: Mapping[str, Final],
    *,
    oracle: Oracle,
    counts: Counter[str],
) -> Iterator[str]:
    """Findings about the last lists of some users, evenly spread over their names."""
    users = sorted(finals)
    for user in users[:: max(1, len(users) // RECOMPUTED_USERS)]:
        said = scores.last(user)
        if not said or said["support_version"] != finals[user].support_version:
            continue  # a finding of its own
        wanted = contents.expected(model, said["model_version"], user, oracle.expected(user))
        if wanted is None:
            continue
        counts[f"{model}_recomputed"] += 1
        if not same_list(listed(said), wanted):
            yield (
                f"User {user}'s last {model} begin with {listed(said)[:2]}, and release {said['model_version']} makes"
                f" {wanted[:2]} of the set."
            )
