"""The stream protocol on a small shop: which moments are asked for, and that no arm knows what comes later."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from innerloop.config import LearningSettings
from innerloop.errors import SettingsError
from innerloop.evaluation.outcome import Outcome
from innerloop.evaluation.shop import Process, Shop
from innerloop.evaluation.stream import protocol as stream_module
from innerloop.evaluation.stream import served as served_module
from innerloop.evaluation.stream.arms import StreamArm, ranks
from innerloop.evaluation.stream.baselines import NAMES
from innerloop.evaluation.stream.options import PRESETS, StreamOptions, options_of
from innerloop.evaluation.stream.protocol import Heard, moments, run
from innerloop.evaluation.stream.served import School, Served, list_length, seen
from innerloop.events import CODES
from innerloop.learning.heads import Head
from innerloop.learning.releases import Release
from innerloop.learning.scorer import Lists, Scorer
from innerloop.learning.stream_log import StreamLog, stream_of
from innerloop.support import SupportSets

OPTIONS = StreamOptions(
    warm_up_share=0.6, capacity=16, train_every_hours=1e6, hits=(5, 10), reciprocal=(10,), sequence="off"
)
SERVED = {"default", "none", "placebo", "stale-1h", "stale-1d"}


def _quiet(_what: str, _share: float) -> None:
    pass


def _history(events: int = 2_000) -> pl.DataFrame:
    process = Process(categories=8, sessions_per_hour=20.0, purchase_rate=0.1)
    return Shop(3, users=60, items=200, process=process).history(events)


def _write(folder: Path, events: pl.DataFrame) -> Path:
    path = folder / "events.parquet"
    events.write_parquet(path)
    return path


@pytest.fixture(scope="module")
def events() -> pl.DataFrame:
    return _history()


@pytest.fixture
def _no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads and baselines, which take most of the time, are left out."""
    monkeypatch.setattr(served_module, "teach_heads", lambda *_args, **_named: {})
    monkeypatch.setattr(stream_module, "baselines", lambda *_args, **_named: [])


@pytest.fixture(scope="module")
def outcome(events: pl.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return run(_write(tmp_path_factory.mktemp("shop"), events), OPTIONS, tell=_quiet)


def _mean(outcome: Outcome, arm: str, metric: str = "hr@10") -> float:
    return float(np.nanmean(outcome.means[arm][metric]))


# --- what comes out


def test_every_arm_is_asked_at_every_moment(outcome: Outcome, events: pl.DataFrame) -> None:
    # Nothing is carted in this shop, so the baseline that ranks what was carted isn't asked.
    assert set(outcome.means) >= SERVED | {"bayes"} | NAMES - {"carted-recents"}
    assert outcome.baselines == frozenset(NAMES)
    rows = moments(stream_of(events), OPTIONS, round(0.6 * events.height))
    for arm, metrics in outcome.means.items():
        assert metrics.keys() == {"hr@5", "hr@10", "mrr@10"}
        for values in metrics.values():
            assert values.shape == rows.shape == outcome.users.shape
            assert np.isfinite(values).all(), arm
            assert ((values >= 0) & (values <= 1)).all()
        assert (metrics["hr@5"] <= metrics["hr@10"]).all()
        assert (metrics["mrr@10"] <= metrics["hr@10"]).all()


def test_what_is_served_beats_the_unadapted_and_the_placebo(outcome: Outcome) -> None:
    assert _mean(outcome, "default") > 1.3 * _mean(outcome, "none") > 0
    assert _mean(outcome, "placebo") < 1.25 * _mean(outcome, "none")
    assert _mean(outcome, "default") > _mean(outcome, "stale-1d")


def test_slices_part_the_moments(outcome: Outcome) -> None:
    sizes = np.stack([outcome.slices[name] for name in outcome.slices if name.startswith("support ")])
    days = np.stack([of for name, of in outcome.slices.items() if name[:2] == "20"])
    assert (sizes.sum(0) == 1).all()
    assert (days.sum(0) == 1).all()


@pytest.mark.usefixtures("_no_others")
def test_every_target_has_its_days(events: pl.DataFrame, tmp_path: Path) -> None:
    outcome = run(_write(tmp_path, events), replace(OPTIONS, targets=("click", "purchase"), every=5), tell=_quiet)
    days = [name for name in outcome.slices if name[:2] == "20"]
    parts = {name: [outcome.slices[f"{kind}, {name}"] for kind in ("click", "purchase")] for name in days}
    assert days
    for name, (clicks, purchases) in parts.items():
        assert not (clicks & purchases).any()
        assert (clicks | purchases).tolist() == outcome.slices[name].tolist()


@pytest.mark.usefixtures("_no_others")
def test_without_sessions_the_sessions_asked_for_are_visits(events: pl.DataFrame, tmp_path: Path) -> None:
    options = replace(options_of("globo"), every=3, warm_up_share=0.6, train_every_hours=1e6, sequence="off")
    outcome = run(_write(tmp_path, events.drop("session_id")), options, tell=_quiet)
    assert len(outcome.users) > 20
    assert outcome.facts["sessions"] == "visits that end after 30 min"
    asked = run(_write(tmp_path, events), options, tell=_quiet)
    assert asked.facts["sessions"] == "as in the data"


def test_every_part_of_a_run_gets_its_seed(
    events: pl.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: dict[str, object] = {}

    def heads(*_args: object, settings: LearningSettings, **_named: object) -> dict[str, Head]:
        seeds["heads"] = settings.seed
        return {}

    def arms(*_args: object, **named: object) -> list[StreamArm]:
        seeds["baselines"] = named.get("seed")
        return []

    monkeypatch.setattr(served_module, "teach_heads", heads)
    monkeypatch.setattr(stream_module, "baselines", arms)
    run(_write(tmp_path, events), replace(OPTIONS, every=20), seed=5, tell=_quiet)
    assert seeds == {"heads": 5, "baselines": 5}


def test_without_examples_default_is_the_unadapted_list(outcome: Outcome) -> None:
    empty = outcome.slices["support 0"]
    assert empty.any()
    for metric in ("hr@10", "mrr@10"):
        assert (outcome.means["default"][metric][empty] == outcome.means["none"][metric][empty]).all()


# --- no arm knows what comes later


def test_what_happens_later_changes_no_earlier_answer_of_any_arm(
    events: pl.DataFrame, outcome: Outcome, tmp_path: Path
) -> None:
    """The last fifth of the events get each other's items: the moments before it must be answered as they were."""
    cut = round(0.8 * events.height)
    mixed = pl.concat(
        [events.head(cut), events.slice(cut).with_columns(pl.col("item_id").shuffle(5), pl.col("category").shuffle(5))]
    )
    again = run(_write(tmp_path, mixed), OPTIONS, tell=_quiet)
    rows = moments(stream_of(events), OPTIONS, round(0.6 * events.height))
    before = rows < cut
    assert before.sum() > 100
    for arm, metrics in outcome.means.items():
        for metric, values in metrics.items():
            found = again.means[arm][metric]
            assert found[before].tolist() == values[before].tolist(), f"{arm} knows what comes later"
    assert any((again.means[arm]["hr@10"] != outcome.means[arm]["hr@10"]).any() for arm in SERVED), "the test can tell"


class _Spied(Scorer):
    """Notes what it knew when it was asked."""

    asked: list[tuple[int, SupportSets]]

    def lists(self, sets: SupportSets, k: int, *, seen: SupportSets | None = None) -> Lists:
        self.asked.append((self.trends.newest, sets))
        return super().lists(sets, k, seen=seen)


@pytest.fixture
def spied(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, SupportSets]]:
    asked: list[tuple[int, SupportSets]] = []
    _Spied.asked = asked
    monkeypatch.setattr(served_module, "Scorer", _Spied)
    return asked


def _served(
    events: pl.DataFrame, options: StreamOptions
) -> tuple[StreamLog, Served, np.ndarray[tuple[int], np.dtype[np.int64]]]:
    log, start = stream_of(events), round(options.warm_up_share * events.height)
    school = School(events, options, 0)
    return log, Served(log, school, school.release(start), options), moments(log, options, start)


@pytest.mark.usefixtures("_no_others")
def test_lists_are_those_that_were_there_at_the_users_event_before(
    events: pl.DataFrame, spied: list[tuple[int, SupportSets]]
) -> None:
    """The user's own events to the last, everybody's no newer than the block that the list was made in."""
    options = replace(OPTIONS, every=3)
    log, served, rows = _served(events, options)
    served.answers(rows, seed=0, tell=lambda _share: None)
    span = round(1_000 * options.block_seconds)
    blocks = [some for _, some in log.lists(rows, options.block_seconds)]
    assert len(blocks) == len(spied)
    assert len(blocks) > 50
    for some, (newest, sets) in zip(blocks, spied, strict=True):
        made = log.answered(rows[some])
        begin = log.times[0] + (made.min() - log.times[0]) // span * span
        assert newest < begin <= made.min()
        assert newest == log.times[log.times < begin].max(initial=0)
        own = sets.newest[: len(some)]  # the first arm's: default's
        assert np.where(own > 0, own, made).tolist() == made.tolist()
        hour = sets.newest[3 * len(some) : 4 * len(some)]
        assert (hour < log.times[rows[some]] - 3_600_000).all(), "stale by an hour"


@pytest.mark.usefixtures("_no_others")
def test_no_list_holds_what_nobody_had_met_when_it_was_made(events: pl.DataFrame) -> None:
    """In a shop where every other event is of a new item, tried one after another within seconds."""
    fresh = events.with_columns(
        pl.when(pl.int_range(pl.len()) % 2 == 0)
        .then(pl.col("item_id") + "-" + pl.int_range(pl.len()).cast(pl.String))
        .otherwise("item_id")
        .alias("item_id")
    )
    log, served, rows = _served(fresh, replace(OPTIONS, block_seconds=600.0))
    found = served.answers(rows, seed=0, tell=lambda _share: None)
    appears = np.array([log.times[log.items == item].min() for item in log.items[rows]])
    unmet = appears > log.answered(rows)
    assert unmet.sum() > 100
    for arm, answers in found.items():
        assert not (answers[unmet] > 0).any(), arm
    assert (found["default"][~unmet] > 0).any()


@pytest.mark.usefixtures("_no_others")
def test_training_again_keeps_what_is_known_of_items(events: pl.DataFrame) -> None:
    """Figures of a release swapped again and again are not far from those of one that stays."""
    once = _served(events, OPTIONS)
    often = _served(events, replace(OPTIONS, train_every_hours=2.0))
    answers = [served.answers(rows, seed=0, tell=lambda _share: None)["default"] for _, served, rows in (once, often)]
    assert len(once[1].releases) == 1
    assert len(often[1].releases) >= 3
    hits = [np.mean((found > 0) & (found <= 10)) for found in answers]
    assert hits[1] > 0.8 * hits[0] > 0


def test_a_placebo_is_another_user_and_nothing_later(events: pl.DataFrame) -> None:
    log, served, rows = _served(events, OPTIONS)
    others = served._others(rows, np.random.default_rng(0))
    assert (log.users[others] != log.users[rows]).all()
    assert (log.times[others] < log.answered(rows)).all(), "nothing is known of it that was not when the list was made"
    assert len(np.unique(others)) > len(rows) / 2, "also where the log is short: not all the same one"
    assert (log.support_sizes(others) > 0).mean() > 0.8, "else a placebo would be no adaptation"


def test_a_placebo_is_never_the_user_even_where_one_has_nearly_all_events() -> None:
    rows = [(1, 0, 0, "click", None), *((0, item % 4, 1 + item, "click", None) for item in range(400))]
    log = _log(rows)
    served = object.__new__(Served)
    served._log = log
    found = served._others(np.arange(1, 401), np.random.default_rng(0))
    assert (found == 0).all()
    alone = object.__new__(Served)
    alone._log = _log(rows[1:])
    assert (alone._others(np.arange(400), np.random.default_rng(0)) == -1).all()


@pytest.mark.usefixtures("_no_others")
def test_alone_a_user_has_no_placebo(events: pl.DataFrame, tmp_path: Path) -> None:
    one = events.head(600).with_columns(pl.lit("u").alias("user_id"))
    outcome = run(_write(tmp_path, one), OPTIONS, tell=_quiet)
    assert np.isnan(outcome.means["placebo"]["hr@10"]).all()
    assert np.isfinite(outcome.means["default"]["hr@10"]).all()


@pytest.mark.parametrize("step", [1_000, 3_600_000])
def test_a_release_is_of_earlier_events_whatever_the_clock_resolves(events: pl.DataFrame, step: int) -> None:
    """The log shuffles what shares a time: the table's rows before a row number may be of that row's own time."""
    coarse = events.with_columns(pl.col("event_time") // step * step)
    log, school = stream_of(coarse), School(coarse, OPTIONS, 0)
    for start in range(200, len(log), 97):
        learned = school._newest(start)["event_time"].to_numpy()
        assert learned.tolist() == log.times[log.times < log.times[start]].tolist()


@pytest.mark.usefixtures("_no_others")
def test_of_a_history_only_what_is_earlier_than_the_data_is_learned_from(events: pl.DataFrame, tmp_path: Path) -> None:
    """A history that goes on into what is asked for changes nothing."""
    cut, options = 1_200, replace(OPTIONS, every=4)
    data = _write(tmp_path, events.slice(cut))
    found = []
    for name, past in (("whole", events), ("earlier", events.head(cut))):
        past.write_parquet(tmp_path / f"{name}.parquet")
        found.append(run(data, options, history=tmp_path / f"{name}.parquet", tell=_quiet))
    for arm, metrics in found[0].means.items():
        for metric, values in metrics.items():
            assert values.tolist() == found[1].means[arm][metric].tolist(), arm
    first = events["event_time"][cut]
    trained_on = [[each["trained_on"] for each in one.facts["releases"]] for one in found]  # type: ignore[attr-defined]
    assert trained_on == [[(events["event_time"] < first).sum()]] * 2
    with pytest.raises(SettingsError, match="no event before the first"):
        run(data, options, history=data, tell=_quiet)


@pytest.mark.usefixtures("_no_others")
def test_what_is_said_of_items_is_known_to_the_release_that_serves(events: pl.DataFrame, tmp_path: Path) -> None:
    kinds = events.select("item_id", text=pl.col("category") + " thing").unique("item_id", maintain_order=True)
    kinds.write_parquet(tmp_path / "items.parquet")
    bare, options = _write(tmp_path, events.drop("category")), replace(OPTIONS, every=20)
    told = run(bare, options, items=tmp_path / "items.parquet", tell=_quiet)
    earlier = events.head(round(events.height * options.warm_up_share))["item_id"].n_unique()
    assert told.facts["described_items"] == kinds.height - earlier > 0
    assert run(bare, options, tell=_quiet).facts["described_items"] == 0
    strangers = kinds.with_columns(item_id="0" + pl.col("item_id"))
    strangers.write_parquet(tmp_path / "items.parquet")
    with pytest.raises(SettingsError, match=r"describes no item that anybody met .*compare the identifiers"):
        run(bare, options, items=tmp_path / "items.parquet", tell=_quiet)


# --- through Kafka


@pytest.mark.usefixtures("_no_others")
def test_a_live_run_is_judged_at_its_own_moments_next_to_default(events: pl.DataFrame, tmp_path: Path) -> None:
    def live(
        _log: StreamLog, rows: np.ndarray[tuple[int], np.dtype[np.int64]], _release: Release, _options: StreamOptions
    ) -> Heard:
        number = np.arange(len(rows))
        return Heard(np.where(number % 2, 1, -1), number % 4 == 1)

    options = replace(OPTIONS, every=4)
    outcome = run(_write(tmp_path, events), options, tell=_quiet, live=live)
    asked = np.arange(len(outcome.users)) % 2 == 1
    heard, same = outcome.means["through-kafka"]["hr@10"], outcome.means["default, same moments"]["hr@10"]
    assert heard[asked].tolist() == [1.0] * asked.sum()
    assert np.isnan(heard[~asked]).all()
    assert np.isnan(same[~asked]).all()
    assert same[asked].tolist() == outcome.means["default"]["hr@10"][asked].tolist()
    newest = np.arange(len(outcome.users)) % 4 == 1
    for arm, whole in (("through-kafka", heard), ("default", same)):
        of_newest = outcome.means[f"{arm}, newest state"]["hr@10"]
        assert np.isnan(of_newest[~newest]).all()
        assert of_newest[newest].tolist() == whole[newest].tolist()
    assert outcome.facts["through_kafka"] == {
        "moments": asked.sum(),
        "older_state": (asked & ~newest).sum() / asked.sum(),
    }


def test_of_no_list_none_is_of_an_older_state() -> None:
    assert Heard(np.full(3, -1), np.zeros(3, np.bool_)).facts == {"moments": 0, "older_state": 0.0}


# --- which moments


Row = tuple[int, int, int, str, int | None]  # user, item, time, type, session
KINDS = ["click", "purchase", "cart"]
rows_of = st.lists(
    st.tuples(
        st.integers(0, 3),
        st.integers(0, 3),
        st.integers(0, 20),
        st.sampled_from(KINDS),
        st.sampled_from([None, 0, 1]),
    ),
    min_size=1,
    max_size=40,
)


def _log(rows: Sequence[Row]) -> StreamLog:
    rows = sorted(rows, key=lambda row: row[2])
    table = pl.DataFrame(
        {
            "user_id": [f"u{user}" for user, *_ in rows],
            "item_id": [f"i{item}" for _, item, *_ in rows],
            "event_time": [1_700_000_000_000 + time for _, _, time, *_ in rows],
            "event_type": [kind for *_, kind, _ in rows],
            "session_id": pl.Series([None if s is None else f"s{s}" for *_, s in rows], dtype=pl.String),
        }
    )
    return stream_of(table)


def _expected(log: StreamLog, options: StreamOptions, start: int) -> list[int]:
    found = []
    for row in range(len(log)):
        earlier = [n for n in range(len(log)) if log.users[n] == log.users[row] and log.times[n] < log.times[row]]
        asked = log.kinds[row] in [CODES[name] for name in options.targets]
        if options.within_session:
            last = max(earlier, key=lambda n: int(log.place[n])) if earlier else None
            if (log.sessions < 0).all():  # no event of the data names a session: half an hour without one ends a visit
                asked = asked and last is not None and log.times[row] - log.times[last] <= 1_800_000
            else:
                asked = asked and last is not None and log.sessions[last] == log.sessions[row] != -1
        if options.remove_seen:
            asked = asked and not any(log.items[n] == log.items[row] for n in earlier)
        if asked:
            found.append(row)
    return [row for number, row in enumerate(found, 1) if number % options.every == 0 and row >= start]


@given(
    rows_of,
    st.lists(st.sampled_from(KINDS), min_size=1, unique=True),
    st.booleans(),
    st.booleans(),
    st.integers(1, 4),
    st.integers(0, 20),
)
def test_moments_are_those_of_a_loop_over_events(  # noqa: PLR0917
    events: list[Row],
    targets: list[str],
    remove: bool,  # noqa: FBT001
    within: bool,  # noqa: FBT001
    every: int,
    start: int,
) -> None:
    options = StreamOptions(targets=tuple(targets), remove_seen=remove, within_session=within, every=every)
    log = _log(events)
    if expected := _expected(log, options, start):
        assert moments(log, options, start).tolist() == expected
    else:
        with pytest.raises(SettingsError, match=r"No event of the data is asked for: choose other targets"):
            moments(log, options, start)


def test_everything_a_user_has_seen_is_removed_however_long_ago() -> None:
    """A user with 300 items is shown all of them again, best first, and then the next one."""
    log = _log([(0, item, item, "click", None) for item in range(301)])
    row, options = np.array([300]), StreamOptions(remove_seen=True)
    lists = np.arange(301)[None], np.arange(301.0, 0.0, -1.0)[None]
    assert served_module.judged(log, row, options, lists, lambda named: named).tolist() == [1]
    found = served_module.judged(log, row, StreamOptions(), lists, lambda named: named)
    assert found.tolist() == [log.items[300] + 1]


@given(rows_of)
def test_ranks_are_the_same_however_few_rows_are_judged_at_once(events: list[Row]) -> None:
    log, options = _log(events), StreamOptions(remove_seen=True)
    every = np.arange(len(log))
    items = np.tile(np.arange(len(log.item_ids)), (len(log), 1))
    lists = items, np.random.default_rng(0).random(items.shape)
    together = served_module.judged(log, every, options, lists, lambda named: named)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(served_module, "_SEEN_AT_ONCE", 3)
        apart = served_module.judged(log, every, options, lists, lambda named: named)
    own = seen(log, every, options)
    assert own is not None
    assert together.tolist() == apart.tolist() == ranks(*lists, log.items, own).tolist()


@given(rows_of)
def test_what_was_seen_is_the_users_items_strictly_before(events: list[Row]) -> None:
    log = _log(events)
    every = np.arange(len(log))
    assert seen(log, every, StreamOptions()) is None
    found = seen(log, every, StreamOptions(remove_seen=True))
    assert found is not None
    for row in range(len(log)):
        own = {int(log.items[n]) for n in every if log.users[n] == log.users[row] and log.times[n] < log.times[row]}
        assert set(found[row].tolist()) - {-1} == own


def test_lists_are_long_enough_for_what_is_removed() -> None:
    options = StreamOptions(hits=(10, 20), reciprocal=(50,), capacity=8)
    assert list_length(options) == 50
    assert list_length(replace(options, remove_seen=True)) >= 50 + 8


@pytest.mark.parametrize(("warm_up", "first"), [(None, 600), (900, 900), (0, 0)])
@pytest.mark.parametrize("preset", [False, True])
def test_the_warm_up_is_what_was_asked_for(
    warm_up: int | None,
    first: int,
    preset: bool,  # noqa: FBT001
) -> None:
    log = stream_of(_history(1_000))
    options = replace(OPTIONS, warm_up=warm_up, most_warm_up=0.95 if preset else None)
    assert stream_module._warm_up(log, options) == first


def test_a_warm_up_that_the_data_has_not_is_refused() -> None:
    log = stream_of(_history(1_000))
    for preset, warm_up in ((None, 1_001), (None, 1_000), ("globo", 5_000), ("taobao", 1_000)):
        with pytest.raises(SettingsError, match=rf"^A warm-up of {warm_up} events leaves none of the 1000 there are"):
            stream_module._warm_up(log, options_of(preset, warm_up=warm_up))
    assert stream_module._warm_up(log, options_of(None, warm_up=999)) == 999


def test_events_of_the_same_time_as_the_first_judged_are_none_to_train_on() -> None:
    log = stream_of(_history(1_000).with_columns(event_time=pl.lit(1_750_000_000_000, pl.Int64)))
    with pytest.raises(SettingsError, match=r"^Of 1000 events 0 are earlier than the first that is judged"):
        stream_module._enough(600, log)
    assert stream_module._enough(600, stream_of(_history(1_000))) == 600


def test_a_presets_warm_up_that_most_of_the_data_would_go_into_is_the_usual_share() -> None:
    """Else of data just above it nothing but the last moments would be scored."""
    log = stream_of(_history(1_000))
    assert stream_module._warm_up(log, replace(OPTIONS, warm_up=990, most_warm_up=0.5)) == 600
    assert stream_module._warm_up(log, replace(options_of("globo"), warm_up_share=0.6)) == 600
    assert stream_module._warm_up(log, options_of("globo", warm_up=990)) == 990


def test_options_are_the_presets_with_what_was_chosen_in_their_place() -> None:
    assert options_of(None) == StreamOptions()
    assert options_of("globo", every=None) == PRESETS["globo"]
    assert options_of("taobao", every=7, targets=("cart",)) == replace(PRESETS["taobao"], every=7, targets=("cart",))
    with pytest.raises(SettingsError, match="no preset amazon: choose one of"):
        options_of("amazon")
    with pytest.raises(SettingsError, match=r"^view is no type of event to foresee"):
        options_of(None, targets=("click", "view"))
    with pytest.raises(SettingsError, match=r"^The cut-off 101 is beyond the lists"):
        options_of(None, hits=(10, 101))
