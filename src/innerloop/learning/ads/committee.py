"""A committee of small perceptrons: the bends and interactions that a linear logit cannot have, at little variance.

Each member is logit = v . tanh(H x + b) + c with few hidden units, begun at random and trained by AdamW (Loshchilov and
Hutter 2019) on the log-loss; the committee's logit is the members' mean. All members are trained at once.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

_MEMBERS, _HIDDEN = 8, 8
_BATCH, _RATE, _DECAY = 256, 3e-3, 1e-2


@dataclass(frozen=True)
class Committee:
    """B members of H units over F features, float32."""

    hidden: Tensor  # [B, H, F]
    bias: Tensor  # [B, H]
    out: Tensor  # [B, H]
    offset: Tensor  # [B]

    @classmethod
    def begin(cls, size: int, share: float, seed: int) -> "Committee":
        """Untrained members over `size` features that predict about `share` of positives."""
        rng = torch.Generator().manual_seed(seed)
        bound = size**-0.5
        hidden = torch.empty(_MEMBERS, _HIDDEN, size).uniform_(-bound, bound, generator=rng)
        bias = torch.empty(_MEMBERS, _HIDDEN).uniform_(-bound, bound, generator=rng)
        out = torch.empty(_MEMBERS, _HIDDEN).uniform_(-(_HIDDEN**-0.5), _HIDDEN**-0.5, generator=rng)
        logit = torch.logit(torch.tensor(min(max(share, 1e-4), 1 - 1e-4)))
        return cls(hidden, bias, out, logit.expand(_MEMBERS).clone())

    def __call__(self, features: Tensor) -> Tensor:
        """Logits [N] of features [N, F]."""
        return self.members(features.float()).mean(0).double()

    def members(self, features: Tensor) -> Tensor:
        """Each member's logits, [B, N]."""
        units = torch.tanh(features @ self.hidden.mT + self.bias.unsqueeze(1))  # [B, N, H]
        return (units @ self.out.unsqueeze(-1)).squeeze(-1) + self.offset.unsqueeze(1)

    def tensors(self) -> list[Tensor]:
        return [self.hidden, self.bias, self.out, self.offset]


def train(
    features: Tensor, labels: Tensor, epochs: int, *, held_out: tuple[Tensor, Tensor] | None = None, seed: int = 0
) -> tuple[Committee, list[float]]:
    """Train on features [N, F] and labels [N]; after each epoch the log-loss on the held-out ones, when given.

    Raises ValueError without examples.
    """
    if not len(labels):
        raise ValueError("There is no example to learn from.")
    x, y = features.float(), labels.float()
    committee = Committee.begin(x.shape[1], float(y.mean()), seed)
    for tensor in committee.tensors():
        tensor.requires_grad = True
    optimiser = torch.optim.AdamW(committee.tensors(), lr=_RATE, weight_decay=_DECAY)
    rng = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(epochs):
        for batch in torch.split(torch.randperm(len(x), generator=rng), _BATCH):
            logits = committee.members(x[batch])
            # A sum over members: each goes its own way, as if trained alone.
            loss = binary_cross_entropy_with_logits(logits, y[batch].expand_as(logits), reduction="none").mean(1).sum()
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        if held_out is not None:
            with torch.no_grad():
                logits = committee(held_out[0])
            losses.append(float(binary_cross_entropy_with_logits(logits, held_out[1].double())))
    return Committee(*(tensor.detach() for tensor in committee.tensors())), losses
