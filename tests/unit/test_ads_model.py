"""Ads through a release: learned from a history, calibrated, and served from support sets."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from innerloop.config import LearningSettings
from innerloop.errors import SettingsError
from innerloop.learning import scorer as module
from innerloop.learning.ads.ad_head import INTENT, POPULATION, VARIANCES, AdHead, Ads
from innerloop.learning.ads.ad_model import AdModel
from innerloop.learning.ads.attribution import DAY, HOUR, NEVER
from innerloop.learning.ads.click_log import CAPACITY, Histories, adapted, of_some_users, own_columns, rows_of
from innerloop.learning.ads.figures import auc, calibration_error
from innerloop.learning.ads.served import past_of
from innerloop.learning.ads.teaching import _final_clicks, learn_ads, log_of
from innerloop.learning.encoder import Encoder
from innerloop.learning.releases import Release, load, save
from innerloop.learning.scorer import Scorer
from innerloop.learning.training import train
from innerloop.support import EXAMPLE, SupportSets, merge, newest

CPU, START = torch.device("cpu"), 1_750_000_000_000
_CLICK, _PURCHASE = 1, 4
_ITEMS, _CATEGORIES, _USERS = 40, 4, 60
_RATES = (0.02, 0.1, 0.3, 0.6)  # of the categories


def test_where_everybody_clicks_much_nobody_is_a_robot() -> None:
    users = np.repeat(np.arange(15), 2_500)
    assert of_some_users(users, 20_000, 0).sum() == 20_000


@given(st.integers(0, 2**32 - 1), st.integers(1, 600))
def test_a_sample_is_of_whole_users_and_of_no_robot(seed: int, most: int) -> None:
    rng = np.random.default_rng(seed)
    users = rng.permutation(np.append(rng.integers(0, 40, 300), np.full(200, 41)))
    drawn = of_some_users(users, most, seed)
    if len(users) <= most:
        assert drawn.all()
        return
    counts, taken = np.bincount(users), np.bincount(users[drawn], minlength=42)
    assert taken.sum() <= most
    assert ((taken == 0) | (taken == counts)).all()
    assert taken[41] == 0
    people = counts[:41][counts[:41] > 0]
    assert taken.sum() > most - people.max() or taken.sum() == people.sum(), "as many as there is room for"


def _history(clicks: int = 4_000, days: int = 8, seed: int = 0) -> pl.DataFrame:
    """A planted process: an item's category alone says how likely its click is bought, 20 minutes later."""
    rng = np.random.default_rng(seed)
    times = START + np.sort(rng.integers(0, days * DAY, clicks))
    users, items = rng.integers(0, _USERS, clicks), rng.integers(0, _ITEMS, clicks)
    bought = rng.random(clicks) < np.array(_RATES)[items % _CATEGORIES]
    rows = [("click", u, i, t) for u, i, t in zip(users, items, times, strict=True)]
    rows += [
        ("purchase", u, i, t + HOUR // 3) for u, i, t in zip(users[bought], items[bought], times[bought], strict=True)
    ]
    kinds, who, what, when = zip(*rows, strict=True)
    table = pl.DataFrame(
        {
            "event_type": kinds,
            "user_id": [f"u{user}" for user in who],
            "item_id": [f"i{item:02}" for item in what],
            "event_time": np.array(when, np.int64),
            "category": [f"c{item % _CATEGORIES}" for item in what],
        }
    ).sort("event_time", maintain_order=True)
    return table.with_columns(pl.format("e{}", pl.int_range(pl.len())).alias("event_id"))


def _whole() -> pl.DataFrame:
    return _history(6_000, days=12)


@pytest.fixture(scope="module")
def release() -> Release:
    """Of the first eight days of twelve."""
    settings = LearningSettings(dimension=8, method="none")
    return train(
        _whole().filter(pl.col("event_time") < START + 8 * DAY), settings=settings, weights={}, capacity=32, version=1
    )


@pytest.fixture(scope="module")
def model(release: Release) -> AdModel:
    assert release.ads is not None
    return release.ads


@pytest.fixture(scope="module")
def head(model: AdModel) -> AdHead:
    assert model.head is not None
    return model.head


def _scorer(release: Release, ads: int = _ITEMS) -> Scorer:
    scorer = Scorer(release, CPU)
    scorer.catalogue.add([(n, f"i{n:02}", f"c{n % _CATEGORIES}") for n in range(_ITEMS)])
    scorer.catalogue.set_ads([(f"ad{n:02}", n) for n in range(ads)])
    return scorer


def _examples(rows: list[tuple[int, int, int]]) -> "np.ndarray[tuple[int], np.dtype[np.void]]":
    """Of (time, item, kind); the hash names the event."""
    return np.array([(time, hash((time, item, kind)) >> 8, item, 1.0, kind) for time, item, kind in rows], EXAMPLE)


def _set(rows: list[tuple[int, int, int]]) -> SupportSets:
    return merge(SupportSets.empty(1), np.zeros(len(rows), np.int64), _examples(rows), 32).sets


def _chances(scorer: Scorer, sets: SupportSets) -> dict[str, float]:
    places, scores = scorer.ads(sets, len(scorer.catalogue.ad_ids))
    return {scorer.catalogue.ad_ids[p]: float(s) for p, s in zip(places[0], scores[0], strict=True)}


def test_served_probabilities_are_calibrated_on_later_clicks(release: Release) -> None:
    """Each later click is asked about as an ad, after what its user had done before it."""
    scorer, log = _scorer(release), log_of(_whole(), release.encoder)
    histories = Histories(log, 32)
    times = log.times[log.clicks]
    asked = log.clicks[(times >= START + 8 * DAY) & (times < START + 11 * DAY)]
    predicted, sold = [], []
    for at in asked.tolist():
        before = histories.before(log.users[[at]], log.times[[at]])
        places = before.places[0][before.mask[0]]
        rows = [(int(log.times[p]), int(log.items[p]), int(log.kinds[p]) + 1) for p in places]
        predicted.append(_chances(scorer, _set(rows))[f"ad{log.items[at]:02}"])
        sold.append(bool(log.attribution.converted_at[at] < NEVER))
    p, y = torch.tensor(predicted, dtype=torch.float64), torch.tensor(sold, dtype=torch.float64)
    assert ((p > 0) & (p < 1)).all()
    assert auc(p, y) > 0.75
    assert float(p.sum() / y.sum()) == pytest.approx(1, abs=0.15)
    assert calibration_error(p, y) < 0.06
    for category, rate in enumerate(_RATES):
        mine = torch.from_numpy(log.items[asked] % _CATEGORIES == category)
        assert float(p[mine].mean()) == pytest.approx(rate, abs=0.12)


@pytest.mark.parametrize("seed", range(3))
def test_a_short_history_promises_no_more_purchases_than_there_were(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The calibration is learned with a head that saw a part of it, and lay elsewhere."""
    monkeypatch.setitem(globals(), "_RATES", (0.01, 0.02, 0.04, 0.08))
    history = _history(4_000, days=4, seed=seed)
    names = [f"i{item:02}" for item in range(_ITEMS)]
    categories, of_item = [f"c{n}" for n in range(_CATEGORIES)], torch.arange(_ITEMS) % _CATEGORIES
    encoder = Encoder(names, torch.zeros(_ITEMS, 3), categories, torch.zeros(_CATEGORIES, 1), of_item)
    model, _ = learn_ads(history, encoder, capacity=32, seed=0)
    assert model is not None
    assert model.head is not None
    clicks = _final_clicks(log_of(history, encoder), DAY, 32, 0)
    assert clicks is not None
    newest = slice(round(0.7 * len(clicks.labels)), None)
    promised = model.head.calibration(clicks.logits(model.head, newest))
    assert float(promised.sum()) == pytest.approx(float(clicks.labels[newest].sum()), rel=0.1)


def test_the_card_tells_how_good_the_probabilities_were(release: Release) -> None:
    figures = release.card.metrics
    assert figures["ads_auc"] > 0.75
    assert 0 <= figures["ads_calibration_error"] < 0.08
    assert figures["ads_log_loss"] < 0.5
    assert figures["ads_predicted_over_observed"] == pytest.approx(1, abs=0.3)
    assert figures["ads_clicks"] > figures["ads_purchases"] > 10


def test_a_purchase_relabels_its_click_in_whatever_order_they_arrive(release: Release) -> None:
    scorer = _scorer(release)
    clicks = [(START + n * HOUR, n % 3, _CLICK) for n in range(8)]
    bought, much_later = (START + 2 * HOUR + 60_000, 2, _PURCHASE), (START + 9 * HOUR, 9, _CLICK)
    orders = [*clicks, much_later], [*clicks, much_later, bought], [*clicks[:3], bought, *clicks[3:], much_later]
    without, late, in_time = (_set(rows) for rows in orders)
    places = scorer.catalogue.places(late.examples["item"])
    assert (past_of(late, places, places).converted_at == bought[0]).sum() == 1
    assert _chances(scorer, late) == _chances(scorer, in_time)
    assert _chances(scorer, late) != _chances(scorer, without)


def test_a_relabelled_click_moves_the_users_own_weights(head: AdHead) -> None:
    """All else held equal: the same events, the same columns, only the label differs."""
    head = head.with_variance(VARIANCES[-1])
    features = head.own_features(torch.zeros(1, 4, len(head.centre)))
    some = torch.ones(1, 4)
    never, once = torch.zeros(1, 4), torch.tensor([[0.0, 1.0, 0.0, 0.0]])
    high, low = ((features @ head.adapt(features, of, some).unsqueeze(-1)).sum() for of in (once, never))
    assert high > low


def test_what_is_served_is_what_was_judged(release: Release, model: AdModel, head: AdHead) -> None:
    """The chances of a batch of moments by way of support sets and by way of the log that training reads."""
    head = head.with_variance(0.1)
    log = log_of(_history(600, days=3, seed=5), release.encoder)
    at = log.clicks[-40:]
    windows = Histories(log, 32).before(log.users[at], log.times[at])
    rate, population = np.full(len(log.users), model.rate), model.items.double().numpy()
    everything = Histories(log, 32).before(log.users[log.clicks], log.times[log.clicks])
    own = own_columns(log, log.clicks, everything, rate[log.clicks])
    support = head.own_features(torch.from_numpy(np.concatenate([own, population[log.items[log.clicks]]], 1)))
    judged = adapted(log, head, support, rows_of(log, log.clicks), windows, support[-40:])
    served = []
    for row, n in enumerate(at.tolist()):
        places = windows.places[row][windows.mask[row]]
        sets = SupportSets(np.array([0, len(places)]), np.zeros(len(places), EXAMPLE))
        oldest_first = np.sort(places)
        sets.examples["time"], sets.examples["item"] = log.times[oldest_first], log.items[oldest_first]
        sets.examples["type"] = log.kinds[oldest_first] + 1
        past = past_of(sets, log.items[oldest_first], log.categories[oldest_first])
        asked = Ads(torch.tensor([[int(log.items[n])]]), torch.tensor([[int(log.categories[n])]]))
        columns = model.population(past.items, past.categories), model.population(asked.items, asked.categories)
        now = torch.tensor([int(log.times[n])])
        served.append(float(head.probabilities(past, columns[0], asked, columns[1], now, model.rate)))
    expected = head.calibration(torch.from_numpy(judged))
    # A past click's own past is cut at the set's capacity in serving, at its own window in training: nearly the same.
    torch.testing.assert_close(torch.tensor(served, dtype=torch.float64), expected, rtol=0.02, atol=0.005)


def test_of_a_larger_support_set_it_reads_what_it_was_taught_with(release: Release) -> None:
    """Sets may keep a thousand events: counts of them would lie beyond all that the weights have seen."""
    rows = np.random.default_rng(0).integers((0, 1), (_ITEMS, 5), (300, 2))
    examples = _examples([(1_000 + 60_000 * n, item, kind) for n, (item, kind) in enumerate(rows.tolist())])
    large = SupportSets(np.array([0, 300]), examples)
    assert _chances(_scorer(release), large) == _chances(_scorer(release), newest(large, CAPACITY))


def test_ads_best_first_alone_or_in_a_batch(release: Release) -> None:
    scorer = _scorer(release)
    rng = np.random.default_rng(0)
    tasks = [
        [(START + int(t) * 60_000, int(rng.integers(_ITEMS)), int(rng.choice([1, 2, 4]))) for t in range(size)]
        for size in (0, 1, 7, 31)
    ]
    alone = [_set(rows) for rows in tasks]
    examples = np.concatenate([one.examples for one in alone])
    together = SupportSets(np.cumsum([0, *(len(one.examples) for one in alone)]), examples)
    places, scores = scorer.ads(together, 7)
    assert places.shape == scores.shape == (4, 7)
    assert (np.diff(scores) <= 0).all()
    assert scorer.ads_kind == "purchase_given_click"
    for row, one in enumerate(alone):
        np.testing.assert_allclose(scorer.ads(one, 7)[1][0], scores[row], rtol=1e-5)


def test_new_items_are_given_their_categorys_chances_and_strange_ones_everybodys(release: Release) -> None:
    scorer = _scorer(release)
    names = [(50 + n, f"new{n}", f"c{n}") for n in range(_CATEGORIES)] + [
        (60, "strange", "unheard of"),
        (61, "bare", None),
    ]
    scorer.catalogue.add(names)
    scorer.catalogue.set_ads([(name, number) for number, name, _ in names])
    found = _chances(scorer, SupportSets.empty(1))
    new = [found[f"new{n}"] for n in range(_CATEGORIES)]
    assert new == sorted(new)
    assert new[3] > 3 * new[0]
    assert new[0] < found["strange"] < new[3]
    assert found["strange"] == found["bare"]


def test_another_release_keeps_each_item_its_own_population(release: Release) -> None:
    """Places come from the catalogue before; rows are the release's."""
    scorer, fresh = _scorer(release), _scorer(release)
    fresh.catalogue.add([(70, "aaa first of all", "c0")])
    fresh.use(release)
    assert _chances(scorer, SupportSets.empty(1)) == pytest.approx(_chances(fresh, SupportSets.empty(1)))


def test_of_many_ads_those_that_the_head_likes_best_are_asked_about(
    release: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer, sets = _scorer(release), _set([(START, 3, _CLICK), (START + HOUR, 5, _CLICK)])
    everything = _chances(scorer, sets)
    monkeypatch.setattr(module, "MOST_ADS", 6)
    head, vectors = scorer.catalogue.head, scorer.catalogue.ad_vectors
    liked = (scorer.parameters(sets) @ vectors.T)[0].topk(6).indices.tolist()
    assert head.linear
    places, scores = scorer.ads(sets, 4)
    expected = sorted((everything[f"ad{n:02}"] for n in liked), reverse=True)[:4]
    assert set(places[0].tolist()) <= set(liked)
    np.testing.assert_allclose(scores[0], expected, rtol=1e-5)


def test_without_ads_or_tasks_there_is_nothing_to_list(release: Release) -> None:
    scorer = _scorer(release, ads=0)
    assert scorer.ads(SupportSets.empty(3), 5)[0].shape == (3, 0)
    assert _scorer(release).ads(SupportSets.empty(0), 5)[0].shape == (0, 5)


def test_a_release_read_back_serves_the_same(release: Release, tmp_path: Path) -> None:
    again = load(save(release, tmp_path))
    sets = _set([(START + n * HOUR, n, _CLICK) for n in range(6)])
    assert _chances(_scorer(again), sets) == _chances(_scorer(release), sets)


def test_a_release_from_before_there_were_rates_of_intent_is_read(release: Release, tmp_path: Path) -> None:
    """It had half of both logits and six columns of an item; what it lacks counts as nothing."""
    assert release.ads is not None
    widened = ("items", "categories", *(f"head.{name}" for name in AdHead.BY_COLUMN))
    state = release.ads.state()
    old = {name: tensor[..., : -len(INTENT)] if name in widened else tensor for name, tensor in state.items()}
    del old["head.linear_share"]
    zero = {name: torch.zeros_like(state[name][..., -len(INTENT) :]) for name in widened}
    same = state | {name: torch.cat([old[name], zero[name]], -1) for name in widened}
    same["head.linear_share"] = torch.tensor([0.5])
    sets = _set([(START + n * HOUR, n, _CLICK) for n in range(6)])
    restored = (replace(release, ads=AdModel.restore(of)) for of in (old, same))
    first, second = (load(save(each, tmp_path)) for each in restored)
    assert _chances(_scorer(first), sets) == _chances(_scorer(second), sets)


def test_a_release_without_an_ad_model_ranks_ads(release: Release, tmp_path: Path) -> None:
    again = load(save(replace(release, ads=None), tmp_path))
    assert again.ads is None
    scorer = _scorer(again)
    assert scorer.ads_kind == "ranking"
    assert scorer.ads(SupportSets.empty(2), 5)[0].shape == (2, 5)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: {"items": m.items[1:]}, "population of items"),
        (lambda m: {"categories": m.categories[1:]}, "population of categories"),
        (lambda m: {"items": torch.full_like(m.items, torch.nan)}, "population of items"),
        (lambda _: {"rate": 1.5}, "conversion rate"),
        (lambda _: {"head": None}, "neither a purchase head nor a click head"),
        (lambda m: {"head": replace(m.head, weights=m.head.weights[1:])}, "weights"),
        (lambda m: {"head": replace(m.head, own_columns=m.head.own_columns + 99)}, "own columns"),
        (lambda m: {"head": replace(m.head, linear_share=1.5)}, "share of the linear logit"),
        (lambda m: {"head": replace(m.head, own_variances=0 * m.head.own_variances)}, "own variances"),
        (
            lambda m: {"head": replace(m.head, committee=replace(m.head.committee, out=m.head.committee.out[:, 1:]))},
            "output",
        ),
    ],
)
def test_a_damaged_ad_model_is_refused_in_a_sentence(  # type: ignore[no-untyped-def]
    release: Release,
    model: AdModel,
    tmp_path: Path,
    change,  # noqa: ANN001
    says: str,
) -> None:
    path = save(replace(release, ads=replace(model, **change(model))), tmp_path)
    with pytest.raises(SettingsError, match=f"has an ad model with .*{says}.*: train it again"):
        load(path)


def _encoder(history: pl.DataFrame) -> Encoder:
    ids = history["item_id"].unique().sort().to_list()
    return Encoder(ids, torch.zeros(len(ids), 8), [], torch.zeros(0, 6), torch.full((len(ids),), -1))


@pytest.mark.parametrize("kept", ["no purchases", "no clicks", "too short", "few"])
def test_a_history_that_cannot_teach_it_gives_none(kept: str) -> None:
    history = {
        "no purchases": _history().filter(pl.col("event_type") == "click"),
        "no clicks": _history().filter(pl.col("event_type") == "purchase"),
        "too short": _history(days=1),
        "few": _history(150),
    }[kept]
    assert learn_ads(history, _encoder(history), capacity=16, seed=0) == (None, {})


def test_without_categories_it_learns_too() -> None:
    history = _history(1_500)
    found, figures = learn_ads(history, _encoder(history), capacity=16, seed=0)
    assert found is not None
    assert found.categories.shape == (1, len(POPULATION) + len(INTENT))
    assert figures["ads_auc"] > 0.6
    again, _ = learn_ads(history, _encoder(history), capacity=16, seed=0)
    assert again is not None
    assert all(torch.equal(value, again.state()[name]) for name, value in found.state().items())


def test_an_attribution_window_counts_in_learning_and_in_serving(release: Release, tmp_path: Path) -> None:
    """Purchases come 20 minutes after their clicks: a quarter of an hour finds none of them, half an hour all."""
    history = _whole().filter(pl.col("event_time") < START + 8 * DAY)
    short, figures = learn_ads(history, release.encoder, capacity=32, seed=0, window=HOUR // 4)
    assert (short, figures) == (None, {})
    settings = LearningSettings(dimension=8, method="none", attribution_hours=0.5)
    ads = train(history, settings=settings, weights={}, capacity=32, version=1).ads
    assert ads is not None
    assert release.ads is not None
    assert (ads.window, release.ads.window) == (HOUR // 2, DAY)
    again = load(save(replace(release, ads=replace(release.ads, window=HOUR // 2)), tmp_path))
    clicks = [(START + n * HOUR, n % 3, _CLICK) for n in range(8)]
    late = _set([*clicks, (START + 3 * HOUR - 60_000, 2, _PURCHASE)])  # almost an hour after its click
    assert _chances(_scorer(again), _set(clicks)) != _chances(_scorer(again), late)  # the purchase itself is seen
    assert _chances(_scorer(again), late) != _chances(_scorer(release), late)  # whether it was the click's is not


def test_figures_are_those_of_a_loop() -> None:
    rng = np.random.default_rng(0)
    p, y = rng.random(60).round(1), (rng.random(60) < 0.4).astype(float)
    wins = [(a > b) + (a == b) / 2 for a in p[y == 1] for b in p[y == 0]]
    assert auc(torch.from_numpy(p), torch.from_numpy(y)) == pytest.approx(float(np.mean(wins)))
    order = np.argsort(p, kind="stable")
    gaps = [abs((p - y)[part].sum()) for part in np.split(order, 10)]
    assert calibration_error(torch.from_numpy(p), torch.from_numpy(y)) == pytest.approx(sum(gaps) / 60)
