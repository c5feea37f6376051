"""A Bayesian linear head around a history encoder's vector: the prior that adaptation starts from is the task's own.

With a history's vector h [d] as the prior's mean, RR' as its covariance and the history's items X [S, d], each a
positive that says less for every later one, the task's parameters are those of `heads.bayes`,

    w = h + R u,    (I + Z'Z) u = Z'r,    Z = W^(1/2) X R,    r = W^(1/2) (1 - X h)

with W = diag(2^(-later items / half_life) / noise). R, the noise and the half-life are learned by gradient through the
solve, together with the encoder whose h they correct (R2-D2, Bertinetto et al. 2019; ALPaCA, Harrison et al. 2018). A
task without examples gets h, bit for bit.
"""

import torch
from torch import Tensor, nn

from innerloop.learning.heads.solve import exact_float32, whitened_step

_FIRST_ROOT, _FIRST_NOISE, _FIRST_HALF_LIFE = 0.1, 1.0, 8.0


class HistoryHead(nn.Module):
    """What a head is taught: `root` [d, d] is R, noise and half-life (in examples) are kept as logarithms."""

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.root = nn.Parameter(_FIRST_ROOT * torch.eye(dimension))
        self.log_noise = nn.Parameter(torch.tensor(_FIRST_NOISE).log())
        self.log_half_life = nn.Parameter(torch.tensor(_FIRST_HALF_LIFE).log())

    def forward(self, prior: Tensor, vectors: Tensor, lengths: Tensor) -> Tensor:
        """Adapt priors [T, d] to vectors [T, S, d], oldest first, of which the first `lengths` [T] count: [T, d]."""
        later = lengths.unsqueeze(1) - 1 - torch.arange(vectors.shape[1], device=vectors.device)  # [T, S]
        says = torch.exp2(-later.clamp(min=0) / (2.0 * self.log_half_life.exp())) * (-0.5 * self.log_noise).exp()
        says = says.masked_fill(later < 0, 0.0)
        with exact_float32(vectors.device):
            seen = vectors.masked_fill((later < 0).unsqueeze(2), 0.0)
            residual = says * (1.0 - (seen @ prior.unsqueeze(2)).squeeze(2))
            step = whitened_step((seen @ self.root) * says.unsqueeze(2), residual) @ self.root.T
        return torch.where((lengths > 0).unsqueeze(1), prior + step, prior)
