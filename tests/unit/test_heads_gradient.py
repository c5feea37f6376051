"""The gradient heads against torch.func: inner steps, and first and second order gradients through them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

from innerloop.learning.heads import (
    AnilHead,
    CaviaHead,
    Head,
    MamlHead,
    ReptileHead,
    Support,
    anil,
    cavia,
    maml,
    mlp,
)
from innerloop.learning.heads.meta import Weights
from innerloop.learning.heads.steps import Examples, Rule

D, H, C, T, S = 6, 4, 3, 5, 9
HALF_LIFE = 100.0


class Model(NamedTuple):
    """A head's functional parts, and the same by the book: weights, parameters [P] and features [d] to a score []."""

    weights: Weights
    adapted: Callable[[Weights, Examples, Rule], Tensor]
    scores: Callable[[Weights, Tensor, Tensor], Tensor]
    start: Callable[[Weights], Tensor]
    book: Callable[[Weights, Tensor, Tensor], Tensor]


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


RATES = {"rates": torch.tensor([0.3, 0.2, 0.1], dtype=torch.float64).log(), "slope": torch.tensor(0.3).double()}


def _book_network(_: Weights, parameters: Tensor, x: Tensor) -> Tensor:
    skip, rest = parameters[:D], parameters[D:]
    first, bias, second, level = rest[: H * D].view(H, D), rest[H * D :][:H], rest[H * D + H :][:H], rest[-1]
    return skip @ x + second @ torch.tanh(first @ x + bias) + level


def _book_context(w: Weights, context: Tensor, x: Tensor) -> Tensor:
    whole = torch.cat([w["first"], w["mix"]], dim=1)
    return w["skip"] @ x + w["second"] @ torch.tanh(whole @ torch.cat([x, context]) + w["bias"])


MODELS = {
    "anil": Model(
        {"start": _normal(D, seed=1), **RATES},
        anil.adapted,
        lambda _w, p, x: (x @ p.unsqueeze(-1)).squeeze(-1),
        lambda w: w["start"],
        lambda _w, p, x: p @ x,
    ),
    "maml": Model(
        {"start": _normal(D + H * (D + 2) + 1, seed=2), **RATES},
        maml.adapted,
        lambda _w, p, x: mlp.scores(p, x),
        lambda w: w["start"],
        _book_network,
    ),
    "cavia": Model(
        {
            "skip": _normal(D, seed=3),
            "first": _normal(H, D, seed=4),
            "mix": _normal(H, C, seed=5),
            "bias": _normal(H, seed=6),
            "second": _normal(H, seed=7),
            **RATES,
        },
        cavia.adapted,
        lambda w, p, x: cavia.forward(w, p, x)[0],
        lambda w: w["mix"].new_zeros(C),
        _book_context,
    ),
}
models = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
likelihoods = pytest.mark.parametrize("likelihood", ["gaussian", "logistic"])


def _support() -> Support:
    mask = torch.arange(S) < torch.tensor([0, 1, 4, 8, 9]).unsqueeze(1)
    labels = (_normal(T, S, seed=8) > 0).double()
    return Support(
        _normal(T, S, D, seed=9), labels, _normal(T, S, seed=10).abs(), 50 * _normal(T, S, seed=11).abs(), mask
    )


def _examples(support: Support, rule: Rule) -> Examples:
    """As `Examples.of`, in float64 throughout."""
    counts = support.mask.sum(-1).clamp(min=1)
    confidence = (support.weights * 0.5 ** (support.ages / rule.half_life)).masked_fill(~support.mask, 0.0)
    shares = confidence / torch.stack([counts, confidence.sum(-1)]).amax(0).unsqueeze(-1)
    return Examples(support.features, support.labels, shares, counts, rule.likelihood)


def _by_the_book(model: Model, w: Weights, examples: Examples, rule: Rule) -> Tensor:
    """Gradient descent on the weighted mean loss, one task under vmap, derivatives by torch.func."""

    def loss(parameters: Tensor, x: Tensor, y: Tensor, share: Tensor) -> Tensor:
        f = vmap(lambda row: model.book(w, parameters, row))(x)
        each = 0.5 * (y - f) ** 2 if rule.likelihood == "gaussian" else torch.nn.functional.softplus(f) - y * f
        return (share * each).sum()

    def task(x: Tensor, y: Tensor, share: Tensor, count: Tensor) -> Tensor:
        parameters = model.start(w)
        for rate in w["rates"]:
            step = grad(loss)(parameters, x, y, share)
            step = step.detach() if rule.first_order else step
            parameters = parameters - torch.exp(rate) * count ** w["slope"] * step
        return parameters

    found: Any = vmap(task)(examples.features, examples.labels, examples.shares, examples.counts.double())
    return torch.as_tensor(found)


@models
@likelihoods
def test_inner_steps_are_those_of_gradient_descent(model: Model, likelihood: Any) -> None:
    rule = Rule(likelihood, HALF_LIFE)
    examples = _examples(_support(), rule)
    expected = _by_the_book(model, model.weights, examples, rule)
    torch.testing.assert_close(model.adapted(model.weights, examples, rule), expected, rtol=1e-9, atol=1e-10)
    assert float((expected[1:] - expected[0]).abs().max()) > 0.1  # the steps do lead somewhere


@models
def test_scores_are_those_of_the_network(model: Model) -> None:
    rule = Rule("gaussian", HALF_LIFE)
    parameters = model.adapted(model.weights, _examples(_support(), rule), rule)
    candidates = _normal(T, 7, D, seed=12)
    expected = vmap(lambda p, rows: vmap(lambda row: model.book(model.weights, p, row))(rows))(parameters, candidates)
    torch.testing.assert_close(model.scores(model.weights, parameters, candidates), expected)


@models
@likelihoods
@pytest.mark.parametrize("order", [1, 2])
def test_the_gradient_through_the_steps_is_right_to_first_and_second_order(
    model: Model, likelihood: Any, order: int
) -> None:
    rule, candidates = Rule(likelihood, HALF_LIFE, first_order=order == 1), _normal(T, 7, D, seed=13)
    examples = _examples(_support(), rule)

    def outer(adapted: Callable[[Weights], Tensor], w: Weights) -> Tensor:
        return (model.scores(w, adapted(w), candidates) - 1.0).square().mean()

    w = {name: value.clone().requires_grad_() for name, value in model.weights.items()}
    found = torch.autograd.grad(outer(lambda w: model.adapted(w, examples, rule), w), list(w.values()))
    expected = grad(lambda w: outer(lambda w: _by_the_book(model, w, examples, rule), w))(model.weights)
    for name, value in zip(w, found, strict=True):
        torch.testing.assert_close(value, expected[name], rtol=1e-8, atol=1e-10, msg=name)


@models
def test_the_second_order_gradient_is_not_the_first_order_one(model: Model) -> None:
    """Or the test above could not tell them apart."""
    found = []
    for first_order in (False, True):
        rule = Rule("gaussian", HALF_LIFE, first_order)
        w = {name: value.clone().requires_grad_() for name, value in model.weights.items()}
        parameters = model.adapted(w, _examples(_support(), rule), rule)
        loss = model.scores(w, parameters, _normal(T, 7, D, seed=13)).square().mean()
        found.append(torch.autograd.grad(loss, list(w.values()))[0])
    assert float((found[0] - found[1]).abs().max()) > 1e-3


@pytest.mark.parametrize("kind", ["anil", "maml", "cavia", "reptile"])
def test_no_steps_change_nothing_bit_for_bit(kind: str) -> None:
    like = "maml" if kind == "reptile" else kind  # the same network, learned in another way
    weights = {name: value.float() for name, value in MODELS[like].weights.items()}
    none, slope = torch.empty(0), weights["slope"]
    heads: dict[str, Callable[[], Head]] = {
        "anil": lambda: AnilHead(weights["start"], none, slope),
        "maml": lambda: MamlHead(weights["start"], none, slope, D),
        "reptile": lambda: ReptileHead(weights["start"], none, slope, D),
        "cavia": lambda: CaviaHead(weights | {"rates": none}),
    }
    head, support = heads[kind](), _support()
    for row in head.adapt(
        Support(support.features.float(), support.labels, support.weights, support.ages, support.mask)
    ):
        assert torch.equal(row, head.prior)


def test_a_step_may_depend_on_the_number_of_examples() -> None:
    rates, slope = torch.tensor([0.5, 0.25]).log(), torch.tensor(-1.0)
    examples = Examples.of(_support(), Rule())
    torch.testing.assert_close(
        examples.sizes(rates, slope).squeeze(-1),
        torch.tensor([[0.5], [0.25]]) / torch.tensor([1.0, 1.0, 4.0, 8.0, 9.0]),  # an empty task counts as one
    )
    flat = examples.sizes(rates, torch.tensor(0.0))
    torch.testing.assert_close(flat[:, :, 0], torch.tensor([[0.5] * T, [0.25] * T]))


def test_many_candidates_are_scored_in_blocks_as_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters, candidates = _normal(T, D + H * (D + 2) + 1, seed=1), _normal(23, D, seed=2)
    whole = mlp.scores(parameters, candidates)
    context = cavia.CaviaHead(MODELS["cavia"].weights)
    scored = context.score(_normal(T, C, seed=3), candidates)
    monkeypatch.setattr(mlp, "_AT_ONCE", 3 * T * H)
    torch.testing.assert_close(mlp.scores(parameters, candidates), whole)
    torch.testing.assert_close(context.score(_normal(T, C, seed=3), candidates), scored)


def test_a_network_that_does_not_fit_its_features_is_refused() -> None:
    state = MamlHead(_normal(D + H * (D + 2) + 1, seed=1), torch.zeros(1), torch.zeros(()), D).state()
    assert MamlHead.restore(state).dimension == D
    with pytest.raises(ValueError, match="make no network"):
        MamlHead.restore(state | {"dimension": torch.tensor(D + 1)})
