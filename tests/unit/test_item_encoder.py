import polars as pl
import pytest
import torch

from innerloop.learning.item_encoder import UNSEEN, ContentCode, ItemEncoder


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def catalogue() -> pl.DataFrame:
    return pl.DataFrame(
        {
            "category": ["shoes", None, "hats", "shoes"],
            "price": [10.0, 20.0, None, 40.0],
            "text": ["Red running shoe", "", None, "blue running shoe"],
        }
    )


def code_of(items: pl.DataFrame) -> ContentCode:
    return ContentCode.of(items, price_buckets=2, word_buckets=64)


def test_what_is_missing_is_coded_as_unknown() -> None:
    content = code_of(catalogue()).encode(catalogue())
    assert content.categories.tolist() == [2, 0, 1, 2]
    assert content.prices.tolist() == [1, 1, 0, 2]
    assert content.word_starts.tolist() == [0, 5, 5, 5, 10]


def test_a_category_never_met_is_unknown_and_prices_beyond_the_edges_fall_into_the_outer_buckets() -> None:
    code = code_of(catalogue())
    content = code.encode(pl.DataFrame({"category": ["boats", "hats"], "price": [-5.0, 1e9], "text": ["x", "y"]}))
    assert content.categories.tolist() == [0, 1]
    assert content.prices.tolist() == [1, 2]


def test_items_without_any_content_columns_are_coded_too() -> None:
    items = pl.DataFrame({"item_id": ["a", "b"]})
    content = code_of(items).encode(items)
    assert len(content) == 2
    vectors = ItemEncoder(2, 8, code=code_of(items))(torch.tensor([0, 1]), content)
    assert vectors.shape == (2, 8)


def test_the_same_words_hash_alike_in_upper_and_lower_case_and_pairs_know_their_order() -> None:
    code = ContentCode(word_buckets=2**30)
    assert code.hashed("Red  SHOE") == code.hashed("red shoe")
    assert sorted(code.hashed("a b")) != sorted(code.hashed("b a"))
    assert set(code.hashed("a b")) & set(code.hashed("b a")) == {*code.hashed("a"), *code.hashed("b")}


def test_content_taken_by_rows_is_that_of_the_rows() -> None:
    items = catalogue()
    code = code_of(items)
    rows = torch.tensor([3, 1, 0, 0, 2])
    taken = code.encode(items).take(rows)
    direct = code.encode(items[rows.tolist()])
    for name in ("categories", "prices", "words", "word_starts"):
        assert torch.equal(getattr(taken, name), getattr(direct, name)), name


def test_a_vector_is_the_sum_of_identifier_category_price_and_mean_of_words() -> None:
    items = catalogue()
    code = code_of(items)
    encoder = ItemEncoder(4, 8, code=code).eval()
    content = code.encode(items)
    assert encoder.categories is not None
    assert encoder.prices is not None
    assert encoder.words is not None
    words = torch.stack([encoder.words.weight[word] for word in code.hashed("Red running shoe")]).mean(0)
    expected = encoder.identifiers.weight[0] + encoder.categories.weight[2] + encoder.prices.weight[1] + words
    torch.testing.assert_close(encoder.table(content)[0], expected)


def test_absent_content_adds_nothing() -> None:
    items = catalogue()
    code = code_of(items)
    encoder = ItemEncoder(4, 8, code=code).eval()
    bare = pl.DataFrame({"category": [None], "price": [None], "text": [None]}, schema_overrides={"price": pl.Float64})
    vector = encoder(torch.tensor([1]), code.encode(bare))
    torch.testing.assert_close(vector[0], encoder.identifiers.weight[1])


def test_an_unseen_item_lies_at_the_unknown_vector_moved_by_its_content() -> None:
    code = code_of(catalogue())
    encoder = ItemEncoder(4, 8, code=code).eval()
    unseen = torch.tensor([UNSEEN, UNSEEN])
    two = encoder(unseen, code.encode(pl.DataFrame({"category": ["shoes", "hats"]})))
    assert encoder.categories is not None
    torch.testing.assert_close(two[0] - two[1], encoder.categories.weight[2] - encoder.categories.weight[1])


def test_id_dropout_hides_identifiers_while_training_only() -> None:
    encoder = ItemEncoder(1000, 4, id_dropout=0.3)
    rows = torch.arange(1000)
    hidden = (encoder(rows) == encoder.identifiers.weight[1000]).all(1).float().mean().item()
    assert hidden == pytest.approx(0.3, abs=0.05)
    assert torch.equal(encoder.eval()(rows), encoder.identifiers.weight[:1000])


def test_with_id_dropout_content_learns_what_tells_unseen_items_apart() -> None:
    """Two categories with opposite targets: an item never trained on must land on its category's side."""
    items = pl.DataFrame({"category": ["a", "b"] * 20})
    code = ContentCode.of(items)
    content = code.encode(items)
    signs = torch.tensor([1.0, -1.0]).repeat(20)
    encoder = ItemEncoder(40, 4, code=code, id_dropout=0.5)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        torch.autograd.backward((encoder.table(content)[:, 0] - signs).square().mean())
        optimizer.step()
    unseen = encoder.eval()(torch.tensor([UNSEEN, UNSEEN]), code.encode(pl.DataFrame({"category": ["a", "b"]})))
    assert unseen[0, 0].item() > 0.5
    assert unseen[1, 0].item() < -0.5
