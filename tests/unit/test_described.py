"""What a shop says of items that nobody has met, and the vectors that they get by it."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import safetensors.torch
import scipy.linalg
import torch
from numpy.typing import NDArray

from innerloop.config import LearningSettings
from innerloop.errors import SettingsError
from innerloop.evaluation.item_table import read_items
from innerloop.learning import described as subject
from innerloop.learning import training
from innerloop.learning.catalogue import Catalogue
from innerloop.learning.described import COLUMNS, Described
from innerloop.learning.encoder import FIXED, Encoder, learn_encoder, signatures
from innerloop.learning.episodes import log_of
from innerloop.learning.releases import Release, load, save
from innerloop.learning.sequence_training import Recipe, Taught, continue_learning, learn_sequences
from innerloop.learning.stream_log import StreamLog, stream_of
from innerloop.learning.training import train, with_categories

COLOURS = ("red", "green", "blue", "black")
ITEMS = 160


def colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def items(count: int = ITEMS, *, told: bool = True) -> pl.DataFrame:
    """Item n is of the colour n % 4, which its name tells beside words that say nothing; all are of one category."""
    rng = np.random.default_rng(0)
    noise = [f"{rng.integers(9)} of {rng.integers(9)}" for _ in range(count)]
    return pl.DataFrame(
        {
            "item_id": [f"i{n:03}" for n in range(count)],
            "category": ["things"] * count,
            "price": [None if n % 7 == 0 else float(n) for n in range(count)],
            "text": [f"{colour(n) if told else 'a'} thing, {noise[n]}" for n in range(count)],
        },
        schema=COLUMNS,
    )


def history(users: int = 200, events: int = 12, *, unmet: int = 40) -> pl.DataFrame:
    """Each user likes one colour; of items the last `unmet` are never met."""
    rng = np.random.default_rng(1)
    rows = [
        ("click", f"u{user}", f"i{int(rng.integers((ITEMS - unmet) // 4)) * 4 + user % 4:03}", "things")
        for _ in range(events)
        for user in range(users)
    ]
    table = pl.DataFrame(rows, schema=["event_type", "user_id", "item_id", "category"], orient="row")
    return table.with_columns(pl.int_range(pl.len()).alias("event_time") * 60_000 + 10**12)


def trained(described: pl.DataFrame | None, sequence: str = "off") -> Release:
    settings = LearningSettings(dimension=16, sequence=sequence, sequence_positions=20_000)
    return train(history(), settings=settings, weights={"click": 1.0}, capacity=16, version=1, items=described)


@pytest.fixture(scope="module")
def release() -> Release:
    return trained(items(), "pooled")


def with_described(encoder: Encoder, described: Described) -> Encoder:
    return subject.with_described(encoder, described, most=1_000)[0]


def encoder_of(count: int = 120, dimension: int = 8, seed: int = 0) -> Encoder:
    """The first items of `items` with random tastes."""
    drawn = torch.Generator().manual_seed(seed)
    taste = torch.nn.functional.normalize(torch.randn(count, dimension - FIXED, generator=drawn), dim=1)
    vectors = torch.cat([taste, torch.zeros(count, 1), torch.ones(count, 1)], 1)
    ids = items()["item_id"].to_list()[:count]
    return Encoder(ids, vectors, [], torch.zeros(0, dimension - FIXED), torch.full((count,), -1))


def test_the_regression_is_that_of_least_squares_with_the_ridge_as_rows_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(subject, "_RIDGES", (3.0,))
    monkeypatch.setattr(subject, "_WORD_BUCKETS", 64)
    encoder, told = encoder_of(), Described.of(items(), {})
    code, table = told.code, items().rows(named=True)
    width = 1 + len(code.price_edges) + 1 + 64
    x = np.zeros((ITEMS, width))
    for n, item in enumerate(table):
        x[n, 0] = 1.0
        if item["price"] is not None:
            x[n, 1 + sum(item["price"] > edge for edge in code.price_edges)] = 1.0
        words = code.hashed(item["text"])
        for word in words:
            x[n, 2 + len(code.price_edges) + word] += 1.0 / len(words) ** 0.5
    known = len(encoder.item_ids)
    ridge = np.vstack([x[:known], 3.0**0.5 * np.eye(width)])
    taste = np.vstack([encoder.vectors[:, :-FIXED].numpy(), np.zeros((width, encoder.dimension - FIXED))])
    weights = np.linalg.lstsq(ridge, taste, rcond=None)[0]
    found = with_described(encoder, told)
    assert found.described_ids == [f"i{n:03}" for n in range(known, ITEMS)]
    np.testing.assert_allclose(found.described_vectors.numpy(), x[known:] @ weights, atol=1e-5)


def test_an_unmet_item_lies_with_those_that_its_name_is_like(release: Release) -> None:
    of_colour = torch.tensor([COLOURS.index(colour(int(item[1:]))) for item in release.item_ids])
    means = torch.stack([release.item_vectors[of_colour == n, :-FIXED].mean(0) for n in range(len(COLOURS))])
    unmet = [f"i{n:03}" for n in range(120, ITEMS)]
    vectors = release.vectors_for(unmet, ["things"] * len(unmet))
    own = vectors[:, :-FIXED] - signatures(unmet, 14)
    nearest = (torch.nn.functional.normalize(own, dim=1) @ torch.nn.functional.normalize(means, dim=1).T).argmax(1)
    assert [COLOURS[n] for n in nearest.tolist()] == [colour(int(item[1:])) for item in unmet]
    assert vectors[:, -FIXED:].tolist() == [[0.0, 1.0]] * len(unmet)
    metrics = release.card.metrics
    assert metrics["content_explains"] > 0.3 > metrics["category_explains"]
    assert metrics["content_used"] == 1.0


def test_the_sequence_model_knows_an_unmet_item_by_its_content(release: Release) -> None:
    assert release.sequence is not None
    red, blue, unknown = release.sequence_vectors_for(["i120", "i122", "nobody's"], ["things", "things", "things"])
    assert not torch.equal(red, blue)
    assert not torch.equal(red, unknown)
    of_colour = torch.tensor([colour(int(item[1:])) == "red" for item in release.item_ids])
    known = release.sequence.vectors[:, :-1]
    apart = known[of_colour].mean(0) - known[~of_colour].mean(0)
    assert float((red - blue)[:-1] @ apart) > 0
    assert float(red[-1]) == float(unknown[-1]), "nothing speaks for either"


def test_descriptions_that_tell_no_more_than_the_category_are_left_out() -> None:
    plain = trained(None)
    told = trained(items(told=False))
    assert told.encoder.described_ids == []
    assert torch.equal(told.item_vectors, plain.item_vectors)
    asked = ["i130", "i131"]
    assert torch.equal(told.vectors_for(asked, ["things", None]), plain.vectors_for(asked, ["things", None]))
    assert told.card.metrics["content_used"] == 0.0
    assert "content_used" not in plain.card.metrics


def test_chance_is_not_taken_for_content() -> None:
    """Random words and random tastes: not more often than two standard errors allow."""
    sure = []
    for seed in range(40):
        encoder = encoder_of(seed=seed)
        worth = subject.with_described(encoder, Described.of(items(told=False), {}), most=10, seed=seed)[1]
        assert worth is not None
        sure.append(worth.sure)
    assert sum(sure) <= 5


def test_few_described_items_teach_nothing() -> None:
    few = items().filter(~pl.col("item_id").is_in([f"i{n:03}" for n in range(40, 120)]))  # 40 met ones, 40 others
    encoder, worth = subject.with_described(encoder_of(), Described.of(few, {}), most=1_000)
    assert worth is None
    assert encoder.described_ids == []


def test_items_without_a_taste_teach_nothing() -> None:
    """Those that were never met with another: their zeros would draw what is foretold to zero."""
    whole = encoder_of()
    lonely = [f"lonely{n}" for n in range(400)]
    rows = torch.tensor([0.0] * 6 + [0.1, 1.0]).expand(400, -1)
    more = replace(
        whole,
        item_ids=[*whole.item_ids, *lonely],
        vectors=torch.cat([whole.vectors, rows]),
        item_categories=torch.full((520,), -1),
    )
    of_lonely = pl.DataFrame({"item_id": lonely, "text": ["red thing"] * 400}, schema_overrides=COLUMNS)
    told = pl.concat([items(), of_lonely.select("item_id", category=None, price=None, text="text").cast(COLUMNS)])  # type: ignore[arg-type]
    alone, among = (
        subject.with_described(encoder, Described.of(told, {}), most=40, seed=1)[0] for encoder in (whole, more)
    )
    taught = dict(zip(among.described_ids, among.described_vectors, strict=True))
    assert set(alone.described_ids) == set(taught)
    edges = [Described.of(table, {}).code.price_edges for table in (told, items())]
    assert edges[0] == edges[1]
    for item, vector in zip(alone.described_ids, alone.described_vectors, strict=True):
        torch.testing.assert_close(vector, taught[item])


def test_an_item_of_a_category_that_no_event_names_keeps_to_what_its_events_will_say() -> None:
    """The regression has learned from named categories, so one of none, or by another name, isn't its business."""
    whole = encoder_of()
    rows = torch.arange(120) % 2
    named = replace(whole, categories=["a", "b"], category_vectors=torch.ones(2, 6), item_categories=rows)
    of_item = {item: "ab"[n % 2] for n, item in enumerate(whole.item_ids)}
    catalogue = pl.Series("category", ["a", None, "B", "b"] * 40)
    told = Described.of(items().with_columns(catalogue), of_item)
    found = with_described(named, told)
    assert found.described_ids == [f"i{n:03}" for n in range(120, ITEMS) if n % 4 in {0, 3}]
    torch.testing.assert_close(found.vector_of("i121", "a")[:-FIXED], named.vector_of("i121", "a")[:-FIXED])
    assert not torch.equal(found.vector_of("i123", "b"), named.vector_of("i123", "b"))


def test_only_so_many_others_are_kept_and_the_first_go_before() -> None:
    found, _ = subject.with_described(encoder_of(), Described.of(items(), {}), most=7)
    assert found.described_ids == [f"i{n:03}" for n in range(120, 127)]
    assert found.described_vectors.shape == (7, 6)


def test_the_commonest_features_are_those_that_are_learned_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """A catalogue of a category for every item must not ask for a system of that size."""
    monkeypatch.setattr(subject, "_MOST_FEATURES", 20)
    sizes: list[int] = []

    def factor(system: NDArray[np.float64], *, overwrite_a: bool) -> object:
        sizes.append(len(system))
        return scipy.linalg.cho_factor(system, overwrite_a=overwrite_a)

    monkeypatch.setattr(subject, "cho_factor", factor)
    many = items().with_columns(category="item_id")
    assert len(with_described(encoder_of(), Described.of(many, {})).described_ids) == 40
    assert set(sizes) == {20}


def test_nothing_and_null_are_descriptions_too() -> None:
    nulls = items().with_columns(price=pl.lit(None, pl.Float64), text=pl.lit(None, pl.String))
    bare = nulls.with_columns(category=pl.lit(None, pl.String))
    for table in (nulls, bare, items().with_columns(text=pl.lit("")), items().with_columns(price=float("nan"))):
        found = with_described(encoder_of(), Described.of(table, {}))
        assert bool(found.described_vectors.isfinite().all())
        assert len(found.described_ids) == 40
    assert with_described(encoder_of(), Described.none()).described_ids == []


def test_a_price_without_bound_has_a_bucket() -> None:
    table = items().with_columns(price=pl.when(pl.col("price") > 80).then(float("inf")).otherwise(pl.col("price")))
    found = with_described(encoder_of(), Described.of(table, {}))
    assert bool(found.described_vectors.isfinite().all())


def test_the_category_that_events_name_goes_before_the_catalogues() -> None:
    told = Described.of(items().with_columns(category="item_id"), {"i001": "shoes", "i003": "hats"})
    assert told.category_names(["i003", "i000", "i002", "i001"]) == ["hats", "i000", "i002", "shoes"]


def test_what_only_the_catalogue_names_are_categories_to_all_of_a_release() -> None:
    """Encoder, sequence model and candidates know the categories; without the catalogue there are none."""
    by_colour = items().with_columns(category=pl.Series([colour(n) for n in range(ITEMS)]))
    nameless = history(users=60).drop("category")
    settings = LearningSettings(dimension=8, sequence="pooled", sequence_positions=2_000)

    def trained(told: pl.DataFrame | None) -> Release:
        return train(nameless, settings=settings, weights={"click": 1.0}, capacity=16, version=1, items=told)

    release, without = trained(by_colour), trained(None)
    assert release.encoder.categories == sorted(COLOURS)
    assert without.encoder.categories == []
    met = release.item_ids
    assert release.encoder.item_category_names() == [colour(int(item[1:])) for item in met]
    assert release.sequence is not None
    assert len(release.sequence.category_vectors) == len(COLOURS)
    catalogue = Catalogue(release, torch.device("cpu"))
    assert [name for _, name in catalogue.named()] == release.encoder.item_category_names()


def test_events_that_name_a_category_keep_theirs() -> None:
    events = pl.DataFrame(
        {"item_id": ["a", "a", "b", "c"], "category": ["new", None, None, None], "event_time": range(4)}
    )
    told = pl.DataFrame(
        {"item_id": ["a", "b"], "category": ["old", "hats"], "price": None, "text": None}, schema=COLUMNS
    )
    assert with_categories(events, told)["category"].to_list() == ["new", None, "hats", None]


def test_lessons_know_of_a_new_item_what_the_service_would(monkeypatch: pytest.MonkeyPatch) -> None:
    """An item that the early release has not met gets the catalogue's category with the next release, not before."""
    told, replayed = history(users=60).drop("category"), list[pl.DataFrame]()

    def kept(table: pl.DataFrame, *, seed: int) -> StreamLog:
        replayed.append(table)
        return stream_of(table, seed=seed)

    monkeypatch.setattr(training, "stream_of", kept)
    settings = LearningSettings(dimension=8, sequence="off")
    release = train(told, settings=settings, weights={"click": 1.0}, capacity=16, version=1, items=items())
    assert release.encoder.categories == ["things"]
    assert ["category" in table.columns for table in replayed] == [False]


def test_an_item_told_of_twice_is_as_it_was_told_last() -> None:
    twice = pl.concat([items().with_columns(text=pl.lit("old")), items()])
    first, second = Described.of(items(), {}), Described.of(twice, {})
    assert torch.equal(first.content.words, second.content.words)


def test_alone_and_together_an_item_has_the_same_vectors(release: Release) -> None:
    asked, names = ["i159", "i000", "stranger", "i121"], ["things", None, "things", None]
    together, of_sequence = release.vectors_for(asked, names), release.sequence_vectors_for(asked, names)
    for n, (item, name) in enumerate(zip(asked, names, strict=True)):
        assert torch.equal(release.vectors_for([item], [name])[0], together[n])
        assert torch.equal(release.sequence_vectors_for([item], [name])[0], of_sequence[n])


def test_a_release_keeps_what_was_foretold(release: Release, tmp_path: Path) -> None:
    loaded = load(save(release, tmp_path))
    asked = [f"i{n:03}" for n in range(110, ITEMS)]
    names: list[str | None] = ["things"] * len(asked)
    assert torch.equal(loaded.vectors_for(asked, names), release.vectors_for(asked, names))
    assert torch.equal(loaded.sequence_vectors_for(asked, names), release.sequence_vectors_for(asked, names))


@pytest.mark.parametrize("which", ["encoder", "sequence"])
def test_descriptions_that_do_not_fit_are_refused(release: Release, tmp_path: Path, which: str) -> None:
    assert release.sequence is not None
    if which == "encoder":
        fewer = replace(release.encoder, described_vectors=release.encoder.described_vectors[1:])
        broken = replace(release, encoder=fewer)
    else:
        broken = replace(release, sequence=replace(release.sequence, described=release.sequence.described * torch.nan))
    with pytest.raises(SettingsError, match="vectors of described items that are not finite float32"):
        load(save(broken, tmp_path))


def test_a_checkpoint_of_other_descriptions_is_refused(tmp_path: Path) -> None:
    events = history()
    log = log_of(events, {"click": 1.0}, sorted(set(events["item_id"])))
    encoder = learn_encoder(log, 16, {})
    recipe = Recipe(kind="pooled", dimension=16, capacity=16, positions=5_000)

    def learn(told: pl.DataFrame) -> Taught | None:
        return learn_sequences(
            log,
            encoder,
            recipe,
            cut=int(events["event_time"][-300]),
            described=Described.of(told, {}),
            tell=lambda *_: None,
            checkpoint=tmp_path,
        )

    learn(items())
    learn(items())
    with pytest.raises(SettingsError, match="of another plan or history"):
        learn(items().with_columns(text=pl.col("text").str.replace("red", "pink")))


def test_going_on_keeps_what_prices_and_words_say() -> None:
    events = history()
    log = log_of(events, {"click": 1.0}, sorted(set(events["item_id"])))
    encoder, told = learn_encoder(log, 16, {}), Described.of(items(), {})
    recipe = Recipe(kind="pooled", dimension=16, capacity=16, positions=20_000)
    taught = learn_sequences(
        log, encoder, recipe, cut=int(events["event_time"][-300]), described=told, tell=lambda *_: None
    )
    assert taught is not None
    assert taught.model.items.words is not None
    assert taught.model.items.prices is not None
    before = [part.weight.detach().clone() for part in (taught.model.items.words, taught.model.items.prices)]
    none = log_of(events.head(0), {"click": 1.0}, log.item_ids)  # nothing more to learn
    gone_on = continue_learning(taught, none, encoder, recipe, described=told, tell=lambda *_: None)
    assert gone_on.model.items.words is not None
    assert gone_on.model.items.prices is not None
    assert torch.equal(gone_on.model.items.words.weight, before[0])
    assert torch.equal(gone_on.model.items.prices.weight, before[1])


def test_a_release_from_before_there_were_descriptions_is_read(release: Release, tmp_path: Path) -> None:
    path = save(release, tmp_path)
    tensors = safetensors.torch.load(path.with_suffix(".safetensors").read_bytes())
    for name in ("described_ids", "described_vectors", "sequence.described"):
        del tensors[name]
    content = safetensors.torch.save(tensors)
    path.with_suffix(".safetensors").write_bytes(content)
    card = json.loads(path.read_text()) | {"sha256": hashlib.sha256(content).hexdigest()}
    path.write_text(json.dumps(card))
    old = load(path)
    assert old.encoder.described_ids == []
    assert torch.equal(old.item_vectors, release.item_vectors)
    assert old.sequence_vectors_for(["i130"], ["things"]).shape == (
        1,
        17 if old.sequence is None else old.sequence.dimension,
    )


# --- from a file


def test_a_file_of_items_is_read_by_the_usual_names(tmp_path: Path) -> None:
    pl.DataFrame({"SKU": [7.0, None, 9.0], "Title": ["Red shoe", "x", None], "PRICE": ["3.5", "1", "dear"]}).write_csv(
        tmp_path / "items.csv"
    )
    read = read_items(tmp_path / "items.csv")
    assert read.schema == pl.Schema(COLUMNS)
    assert read.rows() == [("7", None, 3.5, "Red shoe"), ("9", None, None, None)]


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"name": ["a"]}, "none of which is known as item_id: rename one"),
        ({"item_id": ["a"], "price": [{"amount": 3.0}]}, "more than one value in a row of price"),
        ({"item_id": ["a"], "category": [["Women", "Shoes"]]}, "more than one value in a row of category"),
        ({"item_id": ["a"], "colour": ["red"]}, "says nothing of its items"),
    ],
)
def test_a_file_that_says_nothing_is_refused(tmp_path: Path, columns: dict[str, list[object]], says: str) -> None:
    pl.DataFrame(columns).write_parquet(tmp_path / "items.parquet")
    with pytest.raises(SettingsError, match=says):
        read_items(tmp_path / "items.parquet")


def test_a_missing_file_of_items_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"nowhere.csv is not a file: name a CSV, .* file of items"):
        read_items(tmp_path / "nowhere.csv")
