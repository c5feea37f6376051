"""What a shop says of items that nobody has met, and the vectors that they get by it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from innerloop.config import LearningSettings
from innerloop.errors import SettingsError
from innerloop.evaluation.item_table import read_items
from innerloop.learning import described as subject
from innerloop.learning.described import COLUMNS, Described, with_described, worth_of_content
from innerloop.learning.encoder import FIXED, Encoder, signatures
from innerloop.learning.releases import Release, load, save
from innerloop.learning.training import train

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


def encoder_of(count: int = 120, dimension: int = 8) -> Encoder:
    """The first items of `items` with random tastes."""
    taste = torch.nn.functional.normalize(torch.randn(count, dimension - FIXED, generator=torch.Generator()), dim=1)
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
    assert told.card.metrics["content_explains"] <= max(0.0, told.card.metrics["category_explains"])
    assert "content_explains" not in plain.card.metrics


def test_few_described_items_teach_nothing() -> None:
    told = Described.of(items().head(40), {})
    assert worth_of_content(encoder_of(), told) is None
    assert with_described(encoder_of(), told).described_ids == []


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
    told = Described.of(items(), {"i001": "shoes"})
    assert told.category_names(["i000", "i001"]) == ["things", "shoes"]


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
        ({"name": ["a"]}, "none of which is known as item_id"),
        ({"item_id": ["a"], "colour": ["red"]}, "says nothing of its items"),
    ],
)
def test_a_file_that_says_nothing_is_refused(tmp_path: Path, columns: dict[str, list[str]], says: str) -> None:
    pl.DataFrame(columns).write_parquet(tmp_path / "items.parquet")
    with pytest.raises(SettingsError, match=says):
        read_items(tmp_path / "items.parquet")


def test_a_missing_file_of_items_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"nowhere.csv is not a file: name a CSV, .* file of items"):
        read_items(tmp_path / "nowhere.csv")
