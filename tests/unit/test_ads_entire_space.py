import pytest
import torch

from innerloop.learning.ads.entire_space import _loss, fit_click_and_purchase


def _impressions(count: int, click: torch.Tensor, buy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    x = torch.cat([torch.ones(count, 1), torch.randn(count, len(click) - 1, generator=rng)], 1).double()
    clicked = torch.rand(count, generator=rng) < torch.sigmoid(x @ click)
    bought = clicked & (torch.rand(count, generator=rng) < torch.sigmoid(x @ buy))
    return x, clicked, bought


def test_both_heads_are_found_again() -> None:
    click, buy = torch.tensor([-1.0, 1.0, 0.0]).double(), torch.tensor([-1.0, 0.0, 1.0]).double()
    found = fit_click_and_purchase(*_impressions(20_000, click, buy))
    torch.testing.assert_close(found[0], click, atol=0.1, rtol=0)
    torch.testing.assert_close(found[1], buy, atol=0.15, rtol=0)


def test_without_purchases_to_learn_from_the_second_head_resembles_the_first() -> None:
    """What was learned of clicks is carried over: the weights, if not the level."""
    click = torch.tensor([0.0, 1.5, -1.0]).double()
    x, clicked, _ = _impressions(3_000, click, click)
    bought = torch.zeros_like(clicked)
    bought[torch.nonzero(clicked)[:1]] = True
    few = fit_click_and_purchase(x, clicked, bought, transfer=1e4)
    torch.testing.assert_close(few[1][1:], few[0][1:], atol=0.05, rtol=0)
    assert few[1][0] < -4


def test_the_loss_is_that_of_the_product_of_the_chances() -> None:
    a, b = torch.randn(9, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    click = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 1]).double()
    buy = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1]).double()
    p, both = torch.sigmoid(a), torch.sigmoid(a) * torch.sigmoid(b)
    entropy = torch.nn.functional.binary_cross_entropy
    expected = entropy(p, click, reduction="sum") + entropy(both, buy, reduction="sum")
    torch.testing.assert_close(_loss(a, b, click, buy), expected)


def test_extreme_logits_stay_finite() -> None:
    a = torch.tensor([800.0, -800.0, 800.0], dtype=torch.float64, requires_grad=True)
    loss = _loss(a, a, torch.zeros(3), torch.zeros(3))
    loss.backward()  # type: ignore[no-untyped-call]
    assert torch.isfinite(loss)
    assert a.grad is not None
    assert torch.isfinite(a.grad).all()


def test_nothing_to_learn_from_and_impossible_labels_are_refused() -> None:
    with pytest.raises(ValueError, match="no impression"):
        fit_click_and_purchase(torch.zeros(0, 2), torch.zeros(0), torch.zeros(0))
    with pytest.raises(ValueError, match="without a click"):
        fit_click_and_purchase(torch.ones(1, 2), torch.zeros(1), torch.ones(1))
