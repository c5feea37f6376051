"""The ranker: what its lessons say of the candidates that weren't drawn, and that it learns a rule which is there."""

import numpy as np
import pytest
import torch
from torch import Tensor

from innerloop.learning import ranker as ranker_module
from innerloop.learning.blend import WEIGHTS, blended
from innerloop.learning.candidates import FEATURES, Candidates
from innerloop.learning.ranker import Lesson, Ranker, join, learn_ranker, lesson

F = len(FEATURES)


def _candidates(sizes: list[int], seed: int = 0) -> Candidates:
    """Task t has places 10, 11, ... and random features."""
    starts = np.cumsum([0, *sizes])
    places = np.concatenate([10 + np.arange(size) for size in sizes])
    features = np.random.default_rng(seed).standard_normal((int(starts[-1]), F)).astype(np.float32)
    return Candidates(starts, places, features)


def _ranker(seed: int = 0) -> Ranker:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Ranker.new(torch.zeros(F), torch.ones(F))


def _full_loss(ranker: Ranker, candidates: Candidates, target: list[int], weights: list[float]) -> float:
    """The listwise loss over all candidates, said plainly."""
    total = 0.0
    for task, (place, weight) in enumerate(zip(target, weights, strict=True)):
        own = slice(candidates.starts[task], candidates.starts[task + 1])
        scores = ranker(torch.from_numpy(candidates.features[own])).double()
        at = candidates.places[own].tolist().index(place)
        total += weight * float(scores.logsumexp(0) - scores[at])
    return total / sum(weights)


def test_with_all_candidates_the_loss_is_the_weighted_softmax_cross_entropy() -> None:
    candidates, target, weights = _candidates([5, 2, 60]), [12, 10, 69], [1.0, 4.0, 0.5]
    taught = lesson(candidates, target, weights, np.random.default_rng(0))
    assert len(taught) == 3
    with torch.inference_mode():
        assert float(taught.loss(_ranker())) == pytest.approx(
            _full_loss(_ranker(), candidates, target, weights), rel=1e-5
        )


def test_a_sample_of_the_others_stands_for_all_of_them_without_bias() -> None:
    """The sum of exp f over what was drawn, each as often as its offset says, has the mean of the sum over all."""
    candidates, ranker = _candidates([ranker_module._NEGATIVES * 4]), _ranker()
    with torch.inference_mode():
        others = torch.from_numpy(candidates.features[1:])
        whole = float(ranker(others).exp().sum())
        found = []
        for seed in range(300):
            taught = lesson(candidates, [10], [1.0], np.random.default_rng(seed))
            assert taught.features.shape == (1, 1 + ranker_module._NEGATIVES, F)
            found.append(float((ranker(taught.features) + taught.offset)[0, 1:].exp().sum()))
    assert np.mean(found) == pytest.approx(whole, rel=4 * np.std(found) / np.mean(found) / np.sqrt(len(found)))
    assert np.std(found) / np.mean(found) < 0.1, "the test can tell"


def test_the_item_that_came_next_is_first_and_never_among_the_others() -> None:
    candidates = _candidates([400])
    for seed in range(20):
        taught = lesson(candidates, [77], [1.0], np.random.default_rng(seed))
        own = torch.from_numpy(candidates.features[67])
        assert torch.equal(taught.features[0, 0], own)
        assert not (taught.features[0, 1:] == own).all(1).any()
        assert float(taught.offset[0, 0]) == 0.0


def test_moments_without_their_item_or_without_others_teach_nothing() -> None:
    candidates = _candidates([5, 1, 3, 4])
    taught = lesson(candidates, [99, 10, 11, -1], [1.0, 2.0, 3.0, 4.0], np.random.default_rng(0))
    assert taught.weights.tolist() == [3.0]
    none = lesson(_candidates([1]), [10], [1.0], np.random.default_rng(0))
    assert len(none) == 0
    assert len(join([none, taught, none])) == 1


def _planted(count: int = 600, *, negatives: int = 12, seed: int = 0) -> Lesson:
    """What came next is the one with the largest `head` minus twice the `own_log_age`; other features are noise."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, 1 + negatives, F, generator=generator) * torch.logspace(-2, 2, F) + 5
    best = _rule(features).argmax(1)
    rows = torch.arange(count)
    first = features[:, 0].clone()
    features[:, 0] = features[rows, best]
    features[rows, best] = torch.where((best == 0).unsqueeze(1), features[:, 0], first)
    return Lesson(features, torch.zeros(count, 1 + negatives), torch.ones(count))


def _rule(features: Tensor) -> Tensor:
    scale = torch.logspace(-2, 2, F)
    at, less = FEATURES.index("head"), FEATURES.index("own_log_age")
    rule: Tensor = (features[..., at] - 5) / scale[at] - 2 * (features[..., less] - 5) / scale[less]
    return rule


def _right(ranker: Ranker, lessons: Lesson) -> float:
    """The share of moments whose item is ranked first."""
    with torch.inference_mode():
        return float((ranker(lessons.features).argmax(1) == 0).float().mean())


def test_a_planted_rule_is_learned_whatever_the_features_scales() -> None:
    test = _planted(seed=1)
    learned = learn_ranker(_planted(3_000))
    assert _right(learned, test) > 0.75
    assert _right(_ranker(), test) < 0.2


def test_few_lessons_are_learned_from_in_many_small_steps() -> None:
    """Of 300 lessons the rule is learned within the epochs there are, which one step for each would not do."""
    assert _right(learn_ranker(_planted(300)), _planted(seed=1)) > 0.6


def test_the_same_seed_gives_the_same_ranker_and_leaves_the_worlds_chance_alone() -> None:
    before = torch.random.get_rng_state()
    first, again, other = (learn_ranker(_planted(200), epochs=3, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(value, again.state()[name]) for name, value in first.state().items())
    assert any(not torch.equal(value, other.state()[name]) for name, value in first.state().items())


def test_lessons_that_the_newest_moments_contradict_change_nothing() -> None:
    """The newest moments follow the opposite rule, so no step is better to them: what is kept is the beginning."""
    lessons = _planted(400)
    held = round(len(lessons) * ranker_module._HELD_OUT)
    _opposite(lessons.features[-held:])
    learned = learn_ranker(lessons, epochs=4)
    with torch.inference_mode():
        assert torch.equal(learned(lessons.features), blended(lessons.features, WEIGHTS))
    assert not learned.taught


def _opposite(features: Tensor) -> None:
    """What came next is the one with the smallest value of the rule."""
    worst, rows = _rule(features).argmin(1), torch.arange(len(features))
    first = features[:, 0].clone()
    features[:, 0] = features[rows, worst]
    features[rows, worst] = torch.where((worst == 0).unsqueeze(1), features[:, 0], first)


def test_untaught_it_says_what_the_blend_says_and_is_no_draw_of_chance() -> None:
    before = torch.random.get_rng_state()
    ranker, features = Ranker.untaught(), torch.randn(40, F)
    assert torch.equal(ranker(features), blended(features, WEIGHTS))
    assert not ranker.taught
    assert not any(bool(weights.any()) for weights in ranker.network.parameters()), "two of them are the same"
    assert learn_ranker(_planted(100), epochs=1).taught
    torch.random.set_rng_state(before)
    assert torch.equal(torch.randn(40, F), features), "making one draws nothing"


def test_a_ranker_of_before_there_was_a_blend_says_what_it_said() -> None:
    older, features = _ranker(), torch.randn(9, 5, F)
    state = older.state()
    assert "mean" in state
    assert "blend" not in state
    with torch.inference_mode():
        assert torch.equal(Ranker.restore(state)(features), older.network(features.clamp(-10, 10)).squeeze(-1))


def test_a_version_of_before_there_was_a_blend_cannot_take_the_network_alone_for_the_ranker() -> None:
    """It read `mean`, `scale` and the layers, and nothing else: lists would have been in no order at all."""
    assert "mean" not in Ranker.untaught().state()
    assert "mean" not in learn_ranker(_planted(100), epochs=1).state()


def test_the_best_epoch_by_the_newest_moments_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    lessons, reached = _planted(200), list[float]()
    surprise = ranker_module._surprise

    def noted(ranker: Ranker, held_out: Lesson) -> float:
        reached.append(surprise(ranker, held_out))
        return reached[-1]

    monkeypatch.setattr(ranker_module, "_surprise", noted)
    learned = learn_ranker(lessons, epochs=40)
    assert min(reached) < min(reached[0], reached[-1]), "the test can tell: neither the beginning nor the last is best"
    held = round(len(lessons) * ranker_module._HELD_OUT)
    assert surprise(learned, lessons[len(lessons) - held :]) == pytest.approx(min(reached))


def test_padding_teaches_nothing() -> None:
    plain = _planted(300)
    wide = Lesson(
        torch.cat([plain.features, torch.full((300, 7, F), 1e6)], 1),
        torch.cat([plain.offset, torch.full((300, 7), -torch.inf)], 1),
        plain.weights,
    )
    learned, same = learn_ranker(plain, epochs=1), learn_ranker(wide, epochs=1)
    torch.testing.assert_close(same.mean, learned.mean)
    torch.testing.assert_close(same.scale, learned.scale)
    for one, other in zip(_gradients(learned, plain), _gradients(learned, wide), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)
    # Rounding grows with the steps, and by how much is the processor's: what was learned is the same, not each number.
    torch.testing.assert_close(plain.loss(same), plain.loss(learned), rtol=1e-2, atol=1e-3)


def _gradients(ranker: Ranker, lessons: Lesson) -> tuple[torch.Tensor, ...]:
    weights = list(ranker.network.requires_grad_().parameters())
    return torch.autograd.grad(lessons.loss(ranker), weights)


def test_what_never_moved_while_learning_says_nothing_later() -> None:
    """A shop without purchases in its history must not have its lists turned over by the first one."""
    lessons, at = _planted(300), FEATURES.index("own_bought")
    lessons.features[..., at] = 0.0
    learned = learn_ranker(lessons, epochs=2)
    features = lessons.features[:1].clone()
    features[..., at] = torch.rand(features.shape[:2])
    with torch.inference_mode():
        torch.testing.assert_close(learned(features), learned(lessons.features[:1]))


def test_a_restored_ranker_says_the_same() -> None:
    learned = learn_ranker(_planted(100), epochs=1)
    features = torch.randn(7, 3, F)
    with torch.inference_mode():
        assert torch.equal(Ranker.restore(learned.state())(features), learned(features))
        assert learned(features).shape == (7, 3)
    assert not any(value.requires_grad for value in learned.state().values())
