"""Click and purchase learned together over all impressions, where impressions exist.

The two heads share their features; the click head's probability is p(click), the purchase head's p(purchase | click),
and the product is p(click and purchase), which is what is observed of every impression, clicked or not: no selection of
clicked ones (the entire space; ESMM, Ma et al. 2018). The loss is the log-likelihood of the clicks plus that of
click-and-purchase, with Gaussian priors: the click weights around 0, the purchase weights around the click weights
(transfer), because what makes people click says something of what makes them buy, and purchases are few.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

_ITERATIONS = 200


def fit_click_and_purchase(
    design: Tensor, clicked: Tensor, bought: Tensor, *, precision: float = 1.0, transfer: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Click weights [F] and purchase weights [F], float64.

    `design` [N, F] has the intercept first, `clicked` and `bought` [N] are 0 or 1 and nothing is bought unclicked.
    `precision` holds the click weights to 0, `transfer` the purchase weights to the click weights; intercepts are free.
    Raises ValueError without impressions, or when something was bought without a click.
    """
    x, click, buy = design.double(), clicked.double(), bought.double()
    if not len(x):
        raise ValueError("There is no impression to learn from.")
    if bool((buy > click).any()):
        raise ValueError("A purchase without a click cannot be learned from: set its click to 1.")
    held = torch.ones(x.shape[1], dtype=torch.float64)
    held[0] = 0.0
    heads = torch.zeros(2, x.shape[1], dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([heads], max_iter=_ITERATIONS, line_search_fn="strong_wolfe", tolerance_change=1e-12)

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = _loss(x @ heads[0], x @ heads[1], click, buy)
        value = value + 0.5 * precision * (held * heads[0].square()).sum()
        value = value + 0.5 * transfer * (held * (heads[1] - heads[0]).square()).sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimiser.step(loss)  # type: ignore[no-untyped-call]
    return heads[0].detach(), heads[1].detach()


def _loss(click_logit: Tensor, buy_logit: Tensor, click: Tensor, buy: Tensor) -> Tensor:
    """Minus the log-likelihoods: clicks by p, click-and-purchase by pq; log(1 - pq) without cancellation."""
    clicks = softplus(click_logit) - click * click_logit
    both = logsigmoid(click_logit) + logsigmoid(buy_logit)
    # 1 - pq = (1 - p) + p (1 - q)
    neither = torch.logaddexp(logsigmoid(-click_logit), logsigmoid(click_logit) + logsigmoid(-buy_logit))
    return (clicks - buy * both - (1 - buy) * neither).sum()
