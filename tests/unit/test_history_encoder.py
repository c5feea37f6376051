import pytest
import torch
from torch import Tensor

from innerloop.errors import SettingsError
from innerloop.learning.history_encoder import KINDS, AttentionEncoder, PooledEncoder, history_encoder

KIND = pytest.mark.parametrize("kind", sorted(KINDS))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def histories() -> Tensor:
    return torch.randn(3, 7, 8)


@KIND
def test_nothing_depends_on_what_comes_later(kind: str) -> None:
    encoder = history_encoder(kind, 8, capacity=7).eval()
    vectors = histories()
    whole = encoder(vectors)
    for length in range(1, 7):
        changed = vectors.clone()
        changed[:, length:] = 100.0
        torch.testing.assert_close(encoder(changed)[:, :length], whole[:, :length], rtol=1e-4, atol=1e-5)


@KIND
def test_no_gradient_flows_back_from_an_earlier_row_to_a_later_example(kind: str) -> None:
    encoder = history_encoder(kind, 8, capacity=7, dropout=0.0)
    vectors = histories().requires_grad_()
    (encoder(vectors)[:, 3] @ torch.randn(8)).sum().backward()
    assert vectors.grad is not None
    assert bool((vectors.grad[:, 4:] == 0).all())
    assert bool((vectors.grad[:, :4].abs().sum(-1) > 0).all())


@KIND
def test_batch_mates_and_padding_make_no_difference(kind: str) -> None:
    encoder = history_encoder(kind, 8, capacity=7).eval()
    vectors = histories()
    together = encoder(vectors)
    alone = encoder(vectors[1:2, :4])
    torch.testing.assert_close(together[1:2, :4], alone, rtol=1e-4, atol=1e-5)


@KIND
def test_the_order_of_examples_matters(kind: str) -> None:
    encoder = history_encoder(kind, 8, capacity=7).eval()
    vectors = histories()
    assert not torch.allclose(encoder(vectors)[:, -1], encoder(vectors.flip(1))[:, -1], atol=1e-3)


@KIND
def test_the_same_seed_makes_the_same_encoder(kind: str) -> None:
    torch.manual_seed(1)
    first = history_encoder(kind, 8, capacity=7)
    torch.manual_seed(1)
    second = history_encoder(kind, 8, capacity=7)
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_means_of_the_pooled_encoder_are_exponentially_weighted() -> None:
    encoder = PooledEncoder(1, dropout=0.0)
    with torch.no_grad():
        encoder.rates.fill_(0.0)  # each older example counts half
        encoder.mix.weight.fill_(0.25)
        encoder.mix.bias.zero_()
    out = encoder(torch.tensor([[[1.0], [2.0], [4.0]]]))
    expected = [1.0, (2 + 0.5) / 1.5, (4 + 1 + 0.25) / 1.75]
    assert out.flatten().tolist() == pytest.approx(expected, rel=1e-5)


def test_attention_is_what_its_formula_says() -> None:
    """One block of pre-normalised attention written out by hand."""
    encoder = AttentionEncoder(4, 5, 0.0, layers=1, heads=2).eval()
    vectors = torch.randn(2, 5, 4)
    block = encoder.blocks.layers[0]
    x = vectors * 2.0 + encoder.positions
    normed = block.norm1(x)
    weights, bias = block.self_attn.in_proj_weight, block.self_attn.in_proj_bias
    q, k, v = (normed @ weights.T + bias).split(4, dim=-1)
    heads = []
    for part in (slice(0, 2), slice(2, 4)):
        logits = q[..., part] @ k[..., part].mT / 2**0.5
        logits = logits.masked_fill(torch.triu(torch.ones(5, 5), 1).bool(), -torch.inf)
        heads.append(logits.softmax(-1) @ v[..., part])
    x = x + block.self_attn.out_proj(torch.cat(heads, -1))
    x = x + block.linear2(block.linear1(block.norm2(x)).relu())
    assert encoder.blocks.norm is not None
    torch.testing.assert_close(encoder(vectors), encoder.blocks.norm(x), rtol=1e-4, atol=1e-5)


def test_an_unknown_kind_is_a_sentence_that_names_the_known_ones() -> None:
    with pytest.raises(SettingsError, match="choose one of pooled, gru, attention"):
        history_encoder("lstm", 8, capacity=4)
