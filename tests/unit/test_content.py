"""Content features of whatever columns a table has."""

import numpy as np
import polars as pl
import pytest

from innerloop.learning.content import Content, read_content


def content(table: pl.DataFrame, identifiers: list[str] | None = None, trained: list[bool] | None = None) -> Content:
    names = identifiers or table["id"].to_list()
    return read_content(table, "id", names, np.ones(len(names), bool) if trained is None else np.array(trained))


def block(found: Content, name: str) -> np.ndarray:
    return np.asarray(found.features.toarray()[:, found.groups == found.names.index(name)])


def ids(count: int) -> list[str]:
    return [f"i{number}" for number in range(count)]


def test_the_constant_is_there_even_without_columns() -> None:
    found = content(pl.DataFrame({"id": ids(3)}))
    assert found.names == ("constant",)
    assert found.features.toarray().tolist() == [[1.0], [1.0], [1.0]]


def test_a_category_is_one_column_for_each_frequent_value() -> None:
    found = block(content(pl.DataFrame({"id": ids(8), "kind": ["a"] * 4 + ["b"] * 3 + ["rare"]})), "kind")
    assert found.shape == (8, 2)
    assert found[:4].tolist() == [[1.0, 0.0]] * 4
    assert found[4:7].tolist() == [[0.0, 1.0]] * 3
    assert found[7].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("separator", ["|", ",", ", "])
def test_text_with_separators_is_split_into_trimmed_tokens(separator: str) -> None:
    values = [separator.join(["x", "y"])] * 4 + ["x"] * 3
    found = block(content(pl.DataFrame({"id": ids(7), "tags": values})), "tags")
    assert found.shape == (7, 2)
    assert np.allclose(found[0], 1 / np.sqrt(2))
    assert found[5].tolist() == [1.0, 0.0]


def test_a_token_named_twice_counts_once() -> None:
    once = block(content(pl.DataFrame({"id": ids(4), "tags": ["x|y"] * 4})), "tags")
    twice = block(content(pl.DataFrame({"id": ids(4), "tags": ["x|y|x"] * 4})), "tags")
    assert np.array_equal(once, twice)


def test_a_list_column_is_like_separated_text() -> None:
    listed = content(pl.DataFrame({"id": ids(5), "tags": [["x", "y"]] * 3 + [["x"], None]}))
    text = content(pl.DataFrame({"id": ids(5), "tags": ["x|y"] * 3 + ["x", None]}))
    assert np.array_equal(listed.features.toarray(), text.features.toarray())


def test_free_text_becomes_lower_case_words() -> None:
    titles = ["Red shoe one", "red Shoe two", "RED boot three", "blue shoe four"]
    found = block(content(pl.DataFrame({"id": ids(4), "title": titles})), "title")
    assert found.shape == (4, 2)
    assert np.count_nonzero(found[:, 0]) == 3
    assert np.count_nonzero(found[:, 1]) == 3


def test_numbers_are_interpolated_between_quantiles_and_level_outside() -> None:
    values = [float(v) for v in range(100)]
    table = pl.DataFrame({"id": ids(102), "price": [*values, 1e6, -1e6]})
    found = block(content(table, trained=[True] * 100 + [False] * 2), "price")
    assert np.allclose(found.sum(1), 1.0)
    assert np.array_equal(found[100], found[99])
    assert np.array_equal(found[101], found[0])
    knots = np.quantile(values, np.linspace(0, 1, found.shape[1]))
    assert np.allclose(found[:100] @ knots, values)  # hats reproduce what is linear


def test_whole_numbers_of_few_values_are_categories() -> None:
    found = block(content(pl.DataFrame({"id": ids(9), "age": [1, 18, 25] * 3})), "age")
    assert sorted(found.sum(0).tolist()) == [3.0, 3.0, 3.0]
    assert set(found.ravel()) == {0.0, 1.0}


def test_missing_values_and_unknown_identifiers_are_zeros_but_for_the_constant() -> None:
    table = pl.DataFrame({"id": ids(40), "kind": ["a"] * 39 + [None], "size": [*map(float, range(39)), None]})
    found = content(table, [*ids(40), "stranger"]).features.toarray()
    assert found[39].tolist() == found[40].tolist() == [1.0] + [0.0] * (found.shape[1] - 1)


def test_nothing_is_learned_from_rows_that_are_not_trained_on() -> None:
    table = pl.DataFrame({"id": ids(10), "kind": ["a"] * 5 + ["b"] * 5})
    found = content(table, trained=[True] * 5 + [False] * 5)
    assert block(found, "kind").shape == (10, 1)


def test_the_order_of_the_table_does_not_matter() -> None:
    rng = np.random.default_rng(0)
    table = pl.DataFrame(
        {"id": ids(50), "kind": rng.choice(["a", "b", "c"], 50), "size": rng.normal(size=50), "tags": ["x|y", "y"] * 25}
    )
    shuffled = table.sample(fraction=1.0, shuffle=True, seed=1)
    one, other = content(table, ids(50)), content(shuffled, ids(50))
    assert np.array_equal(one.features.toarray(), other.features.toarray())


def test_the_width_is_bounded() -> None:
    tags = [f"t{n}" for n in range(2000) for _ in range(3)]
    assert content(pl.DataFrame({"id": ids(6000), "tag": tags})).features.shape == (6000, 801)
    three = pl.DataFrame({"id": ids(6000), "one": tags, "two": tags, "three": tags, "four": tags})
    assert content(three).features.shape == (6000, 4 * 400 + 1)


def test_a_doubled_identifier_keeps_its_first_row() -> None:
    table = pl.DataFrame({"id": ["i0", "i0", "i1", "i2"], "kind": ["a", "b", "a", "a"]})
    assert content(table, ["i0", "i1", "i2"]).features.toarray()[0].tolist() == [1.0, 1.0]
