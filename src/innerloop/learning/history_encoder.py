"""A task's examples in their order to one vector after each of them: what the next one is expected to look like.

Every encoder maps the item vectors [B, S, d] of B histories, oldest first and padded at the end, to [B, S, d]. Row t
depends on examples 0 .. t alone, so one pass gives a training signal at every position and padding needs no mask.

    pooled      exponentially decayed means with learned rates, then one linear layer. Cheap and hard to overfit
    gru         a gated recurrent unit (Cho et al. 2014), as GRU4Rec uses it (Hidasi et al. 2016)
    attention   causal self-attention blocks with learned positions, SASRec (Kang and McAuley 2018), normalised before
                each block
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from innerloop.errors import SettingsError

_RATES = 4  # decayed means side by side in `pooled`
_INIT = 0.02


def last_of(history: nn.Module, vectors: Tensor, lengths: Tensor) -> Tensor:
    """What an encoder makes of histories' vectors [B, S, d], of which the first `lengths` [B] count: [B, d].

    The row after the last example; of an empty history it means nothing. Some encoders need not make the others.
    """
    if isinstance(history, PooledEncoder):
        return history.last(vectors, lengths)
    at = torch.arange(len(vectors), device=vectors.device)
    found: Tensor = history(vectors)[at, (lengths - 1).clamp(min=0)]
    return found


def history_encoder(kind: str, dimension: int, *, capacity: int, dropout: float = 0.2, layers: int = 2) -> nn.Module:
    """Make the encoder of that kind for histories of at most `capacity` examples.

    Raises SettingsError for an unknown kind. `layers` counts blocks of `gru` and `attention`.
    """
    if kind not in KINDS:
        raise SettingsError(f"The history encoder {kind} is unknown: choose one of {', '.join(KINDS)}.")
    return KINDS[kind](dimension, capacity, dropout, layers)


class PooledEncoder(nn.Module):
    """Means whose weights fall by a learned rate per step, one linear layer on top."""

    def __init__(self, dimension: int, dropout: float) -> None:
        super().__init__()
        self.rates = nn.Parameter(torch.linspace(-2.0, 3.0, _RATES))  # logits of the share kept at each step
        self.mix = nn.Linear(_RATES * dimension, dimension)
        self.dropout = nn.Dropout(dropout)

    def forward(self, vectors: Tensor) -> Tensor:
        """[B, S, d] -> [B, S, d]."""
        steps = torch.arange(vectors.shape[1], device=vectors.device)
        age = steps.unsqueeze(1) - steps  # [S, S], how many examples lie between
        kept = torch.sigmoid(self.rates).log().view(-1, 1, 1) * age.clamp(min=0)
        weights = torch.softmax(kept.masked_fill(age < 0, -torch.inf), dim=-1)  # [R, S, S]
        means = torch.einsum("rts,bsd->btrd", weights, self.dropout(vectors))
        return self.mix(means.flatten(2))  # type: ignore[no-any-return]

    def last(self, vectors: Tensor, lengths: Tensor) -> Tensor:
        """The row after each history's last example, [B, d], of which the first `lengths` [B] count."""
        age = lengths.unsqueeze(1) - 1 - torch.arange(vectors.shape[1], device=vectors.device)  # [B, S]
        kept = torch.sigmoid(self.rates).log().view(1, -1, 1) * age.clamp(min=0).unsqueeze(1)  # [B, R, S]
        weights = torch.softmax(kept.masked_fill((age < 0).unsqueeze(1), -torch.inf), dim=-1).nan_to_num()
        return self.mix((weights @ vectors).flatten(1))  # type: ignore[no-any-return]


class GruEncoder(nn.Module):
    """A gated recurrent unit and one linear layer."""

    def __init__(self, dimension: int, dropout: float, layers: int) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.gru = nn.GRU(dimension, dimension, layers, batch_first=True, dropout=dropout if layers > 1 else 0.0)
        self.out = nn.Linear(dimension, dimension)

    def forward(self, vectors: Tensor) -> Tensor:
        """[B, S, d] -> [B, S, d]."""
        states, _ = self.gru(self.dropout(vectors))
        return self.out(states)  # type: ignore[no-any-return]


class AttentionEncoder(nn.Module):
    """SASRec: positions are counted from the newest window's start, at most `capacity` of them."""

    def __init__(self, dimension: int, capacity: int, dropout: float, layers: int, heads: int = 2) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.empty(capacity, dimension).normal_(std=_INIT))
        self.dropout = nn.Dropout(dropout)
        block = nn.TransformerEncoderLayer(
            dimension, heads, dim_feedforward=2 * dimension, dropout=dropout, batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, layers, norm=nn.LayerNorm(dimension), enable_nested_tensor=False)

    def forward(self, vectors: Tensor) -> Tensor:
        """[B, S, d] -> [B, S, d]; S is at most the capacity."""
        length = vectors.shape[1]
        ahead = nn.Transformer.generate_square_subsequent_mask(length, device=vectors.device)
        scaled = vectors * vectors.shape[-1] ** 0.5
        hidden = self.dropout(scaled + self.positions[:length])
        return self.blocks(hidden, mask=ahead, is_causal=True)  # type: ignore[no-any-return]


KINDS: dict[str, Callable[[int, int, float, int], nn.Module]] = {
    "pooled": lambda dimension, _capacity, dropout, _layers: PooledEncoder(dimension, dropout),
    "gru": lambda dimension, _capacity, dropout, layers: GruEncoder(dimension, dropout, layers),
    "attention": AttentionEncoder,
}
