import torch
from torch import Tensor

from innerloop.learning.history_encoder import KINDS, history_encoder, last_of
from innerloop.learning.history_head import HistoryHead
from innerloop.learning.item_encoder import ItemEncoder
from innerloop.learning.softmax_training import Histories, Plan, SequenceModel, SoftmaxLoss, Trainer, held_out_gains

D, S = 4, 6


def taught_head() -> HistoryHead:
    head = HistoryHead(D)
    with torch.no_grad():
        head.root.copy_(torch.randn(D, D, generator=torch.Generator().manual_seed(1)) * 0.7)
        head.log_noise.fill_(0.3)
        head.log_half_life.fill_(1.1)
    return head


def tasks(lengths: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    shape = len(lengths)
    return (
        torch.randn(shape, D, generator=generator),
        torch.randn(shape, S, D, generator=generator),
        torch.tensor(lengths),
    )


def test_it_is_the_posterior_mean_of_a_linear_model_around_the_priors_vector() -> None:
    head, (prior, vectors, lengths) = taught_head().double(), tasks([6, 3])
    prior, vectors = prior.double(), vectors.double()
    found = head(prior, vectors, lengths).detach()
    covariance = (head.root @ head.root.T).detach()
    for task, length in enumerate([6, 3]):
        x = vectors[task, :length]
        later = torch.arange(length - 1, -1, -1)
        precision = torch.diag(torch.exp2(-later / head.log_half_life.exp()) / head.log_noise.exp()).detach()
        posterior = torch.linalg.inv(torch.linalg.inv(covariance) + x.T @ precision @ x)
        expected = prior[task] + posterior @ x.T @ precision @ (1.0 - x @ prior[task])
        torch.testing.assert_close(found[task], expected, rtol=1e-6, atol=1e-8)


def test_its_gradient_is_that_of_finite_differences_in_everything_that_is_learned() -> None:
    head, (prior, vectors, lengths) = taught_head().double(), tasks([5, 2, 0])
    inputs = [prior.double().requires_grad_(), vectors.double().requires_grad_(), *head.parameters()]

    def adapted(prior: Tensor, vectors: Tensor, *_: Tensor) -> Tensor:
        return head(prior, vectors, lengths)  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(adapted, inputs)


def test_a_task_without_examples_keeps_its_prior_bit_for_bit_whatever_is_padded() -> None:
    head, (prior, vectors, lengths) = taught_head(), tasks([0, 4])
    vectors[0] = 1e6
    assert torch.equal(head(prior, vectors, lengths)[0], prior[0])


def test_batched_is_one_by_one_and_padding_is_not_looked_at() -> None:
    head, (prior, vectors, lengths) = taught_head(), tasks([6, 1, 3, 0])
    whole = head(prior, vectors, lengths)
    for task, length in enumerate(lengths.tolist()):
        some = slice(task, task + 1)
        alone = head(prior[some], vectors[some, : max(1, length)], lengths[some])
        torch.testing.assert_close(whole[some], alone, rtol=1e-4, atol=1e-4)


def test_the_last_row_alone_is_the_last_of_all_rows_for_every_encoder() -> None:
    _, vectors, lengths = tasks([6, 1, 3])
    for kind in KINDS:
        encoder = history_encoder(kind, D, capacity=S, dropout=0.0).eval()
        rows = encoder(vectors)[torch.arange(3), lengths - 1]
        torch.testing.assert_close(last_of(encoder, vectors, lengths), rows, rtol=1e-5, atol=1e-5)


def circle(tasks: int, items: int = 20) -> Histories:
    generator = torch.Generator().manual_seed(5)
    first = torch.randint(items, (tasks, 1), generator=generator)
    held = torch.arange(S) == S - 1
    return Histories((first + torch.arange(S)) % items, torch.full((tasks,), S), held.expand(tasks, -1))


def model(head: HistoryHead | None) -> SequenceModel:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return SequenceModel(ItemEncoder(20, 8), history_encoder("pooled", 8, capacity=S, dropout=0.0), head=head)


def test_episodes_teach_encoder_and_head_through_the_solve() -> None:
    histories, of = circle(200), model(HistoryHead(8))
    before = {name: value.clone() for name, value in of.state_dict().items()}
    plan = Plan(epochs=8, batch=32, negatives=20, learning_rate=0.02, cuts=2)
    start = float(held_out_gains(of, histories, plan).mean())
    done = Trainer(of, histories, plan).run()
    moved = {name for name, value in of.state_dict().items() if not torch.equal(value, before[name])}
    assert {"head.root", "head.log_noise", "head.log_half_life", "history.rates"} <= moved
    assert max(done.scores) > start + 0.3


def test_the_loss_through_the_head_uses_only_what_is_before_the_query() -> None:
    of = model(HistoryHead(8))
    items = torch.arange(S).unsqueeze(0)
    other = items.clone()
    other[0, 4:] = 17
    learned = torch.tensor([[False, False, True, True, False, False]])
    drawn, log_expected = torch.arange(20), torch.zeros(20)
    losses = [SoftmaxLoss(of)(some, learned, drawn, log_expected) for some in (items, other)]
    torch.testing.assert_close(losses[0], losses[1])
