"""How the cold-start protocol finds its settings: on users and items held out of the training part, nowhere else."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy.sparse import csr_matrix

from innerloop.errors import SettingsError
from innerloop.evaluation.cold_start.arms import Arms, ModelSettings, bayes, learn_heads
from innerloop.evaluation.cold_start.baselines import (
    CATEGORY_COLUMNS,
    Popularity,
    PopularityInCategory,
    RatingArm,
    learn_candidates,
)
from innerloop.evaluation.cold_start.decision import DecisionRule, Prediction
from innerloop.evaluation.cold_start.episodes import Episodes, draw_episodes
from innerloop.evaluation.cold_start.heads import HeadArm
from innerloop.evaluation.cold_start.histories import Histories, WithHistory
from innerloop.evaluation.cold_start.ratings import RatingData
from innerloop.evaluation.outcome import Bools, Ints
from innerloop.learning.content import Content, read_content
from innerloop.learning.heads import Recipe
from innerloop.learning.rating_model import RatingModel, Ratings, learn_ratings

_FACTORS = (8, 16, 32)
_POPULARITIES = (0.0, 0.5, 1.0, 1.5, 2.0)
_NOISES = (0.7, 1.0, 1.4)
_MOST_NUMBERS = 60_000_000  # in an array of covariances, half a gigabyte
_MOST_PRODUCTS = 1_500_000_000  # in one round of the model's learning, seconds
_HELD_OUT = 0.15  # of the users, and of the items
_QUERIES, _DRAWS, _MOST_EPISODES = 5, 3, 1_000
_SHOTS = (0, 1, 2, 3, 5, 10, 20, 50, 1_000)

Tell = Callable[[str, float], None]


@dataclass(frozen=True)
class Chosen:
    """What validation found: the model's settings, which of a baseline's settings, each arm's rule; and its errors."""

    model: ModelSettings
    baselines: Mapping[str, int]
    rules: Mapping[str, DecisionRule]
    facts: Mapping[str, object]


@dataclass(frozen=True)
class _Validation:
    """Episodes of one kind of held-out ratings, and how many examples are known, [E]."""

    episodes: Episodes
    shots: Ints


def choose(data: RatingData, recipe: Recipe, tell: Tell) -> Chosen:
    """Learn on a part of meta_training and choose on the rest of it, by squared error.

    Raises SettingsError when too few ratings are left to choose on.
    """
    seed = recipe.seed
    part, held_out = split(data.training, seed)
    validation = [found for kind, test in enumerate(held_out) for found in _validation(test, seed + kind)]
    if not len(part.users) or not validation:
        raise SettingsError(f"meta_training has too few users with more than {_QUERIES} ratings: give it more.")
    contents = contents_of(data)
    models = {}
    for done, factors in enumerate(_feasible(data)):
        tell(f"choosing among models, {factors} factors", 0.4 * done / len(_FACTORS))
        models[factors] = learn_ratings(part, *contents, factors=factors, seed=seed)
    scores = _model_errors(models, validation)
    model = min(scores, key=scores.__getitem__)
    tell("choosing among settings of baselines", 0.4)
    grid = _informed(learn_candidates(part, len(data.item_ids), seed), part)
    errors = {name: [_error(arm, validation) for arm in arms] for name, arms in grid.items()}
    baselines = {name: int(np.argmin(values)) for name, values in errors.items()}
    arms = learn_heads(
        model.tasks(models[model.factors]), model, part, recipe, lambda name: tell(f"decision rules, {name}", 0.7)
    )
    rules = {
        name: _rule(arm, validation)
        for name, arm in (arms | {name: grid[name][at] for name, at in baselines.items()}).items()
    }
    rules["none"] = rules["placebo"] = rules["bayes"]  # without examples bayes is none, and so is what it decides
    return Chosen(model, baselines, rules, _facts(scores, errors))


def learn_arms(data: RatingData, chosen: Chosen, recipe: Recipe, tell: Tell) -> Arms:
    """Every arm but the placebo, learned on all of meta_training; heads first, then baselines."""
    tell("learning the model", 0.0)
    model = learn_ratings(data.training, *contents_of(data), factors=chosen.model.factors, seed=recipe.seed)
    heads = learn_heads(
        chosen.model.tasks(model), chosen.model, data.training, recipe, lambda name: tell(f"learning {name}", 0.3)
    )
    tell("learning the baselines", 0.8)
    count = len(data.item_ids)
    grid = _informed(learn_candidates(data.training, count, recipe.seed, chosen.baselines), data.training)
    popularity: Arms = {"popularity": Popularity.learn(data.training, count)}
    if (categories := item_categories(data)) is not None:
        in_category = PopularityInCategory(Popularity.learn(data.training, count).counts, categories)
        popularity["popularity-in-category"] = WithHistory(in_category, Histories.of(data.training))
    return heads | {name: found[0] for name, found in grid.items()} | popularity


def _informed(grid: Mapping[str, list[RatingArm]], ratings: Ratings) -> dict[str, list[RatingArm]]:
    """The baselines learned from `ratings`, which know the users of these by them, as `default` does."""
    histories = Histories.of(ratings)
    return {name: [WithHistory(arm, histories) for arm in arms] for name, arms in grid.items()}


def item_categories(data: RatingData) -> csr_matrix | None:
    """Which categories each item is of, [M, C]; None where the items have no column of such a name, or an empty one."""
    named = {name.lower(): name for name in reversed(data.items.columns)}
    column = next((named[name] for name in CATEGORY_COLUMNS if name in named), None)
    if column is None:
        return None
    known = np.isin(np.arange(len(data.item_ids)), data.training.items)
    content = read_content(data.items.select("item_id", column), "item_id", data.item_ids, known)
    features = csr_matrix(content.features[:, content.groups > 0] > 0, dtype=np.float64)
    return features if features.shape[1] else None


def _feasible(data: RatingData) -> list[int]:
    """The numbers of factors that fit into memory and into a few minutes; the least of them in any case."""
    rows, ratings = len(data.user_ids) + len(data.item_ids), len(data.training.users)

    def fits(factors: int) -> bool:
        each = (factors + 1) ** 2
        return rows * each <= _MOST_NUMBERS and ratings * each <= _MOST_PRODUCTS

    return [factors for factors in _FACTORS if fits(factors)] or [min(_FACTORS)]


def contents_of(data: RatingData) -> tuple[Content, Content]:
    """Content of users and of items; its vocabulary is that of those with training ratings."""
    users = np.isin(np.arange(len(data.user_ids)), data.training.users)
    items = np.isin(np.arange(len(data.item_ids)), data.training.items)
    return (
        read_content(data.users, "user_id", data.user_ids, users),
        read_content(data.items, "item_id", data.item_ids, items),
    )


def split(ratings: Ratings, seed: int) -> tuple[Ratings, list[Ratings]]:
    """What to learn on; then new users with known items, known users with new items, and both new."""
    rng = np.random.default_rng(seed)
    user, item = _some(ratings.users, rng), _some(ratings.items, rng)
    return ratings.where(~user & ~item), [ratings.where(at) for at in (user & ~item, ~user & item, user & item)]


def _some(numbers: Ints, rng: np.random.Generator) -> Bools:
    everyone = np.unique(numbers)
    return np.isin(numbers, rng.permutation(everyone)[: max(1, round(_HELD_OUT * len(everyone)))])


def _validation(test: Ratings, seed: int) -> list[_Validation]:
    """Some random users' episodes, with no examples, a few, and all of them."""
    found = []
    for draw in range(_DRAWS):
        rng = np.random.default_rng([seed, draw])
        episodes = draw_episodes(test, seed=seed * _DRAWS + draw, queries=_QUERIES)
        episodes = episodes.where(rng.permutation(len(episodes.users))[:_MOST_EPISODES])
        if len(episodes.users):
            found.append(_Validation(episodes, rng.choice(_SHOTS, len(episodes.users))))
    return found


def _model_errors(models: Mapping[int, RatingModel], validation: list[_Validation]) -> dict[ModelSettings, float]:
    errors = {}
    for factors, popularity in product(models, _POPULARITIES):
        tasks = ModelSettings(factors, popularity, 1.0).tasks(models[factors])
        for noise in _NOISES:
            settings = ModelSettings(factors, popularity, noise)
            errors[settings] = _error(HeadArm(bayes(tasks, noise), tasks), validation)
    return errors


def _error(arm: RatingArm, validation: list[_Validation]) -> float:
    """The mean over the parts of the mean squared error: each kind of cold start counts the same."""
    parts = [np.mean((arm.predict(v.episodes, v.shots).mean - v.episodes.asked) ** 2) for v in validation]
    return float(np.mean(parts))


def _rule(arm: RatingArm, validation: list[_Validation]) -> DecisionRule:
    parts = [arm.predict(v.episodes, v.shots) for v in validation]
    joined = Prediction(*(np.concatenate(column) for column in zip(*parts, strict=True)))
    return DecisionRule.learn(joined, np.concatenate([v.episodes.asked for v in validation]))


def _facts(scores: Mapping[ModelSettings, float], errors: Mapping[str, list[float]]) -> dict[str, object]:
    return {
        "validation, squared error in variances of the ratings (factors, popularity, noise)": {
            f"{at.factors}, {at.popularity}, {at.noise}": round(value, 5) for at, value in scores.items()
        },
        "validation, the same of baselines": {n: [round(v, 5) for v in values] for n, values in errors.items()},
    }
