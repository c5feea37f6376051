import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from innerloop.errors import SettingsError
from innerloop.learning.history_encoder import history_encoder
from innerloop.learning.item_encoder import ItemEncoder
from innerloop.learning.softmax_training import (
    Histories,
    Plan,
    SequenceModel,
    SoftmaxLoss,
    Trainer,
    held_out_ndcg,
    log_partition,
)

ITEMS = 30


def histories(tasks: int = 40, *, hold: bool = True) -> Histories:
    """Each item is followed by its successor in a circle of `ITEMS`."""
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(3, 8, (tasks,), generator=generator)
    first = torch.randint(ITEMS, (tasks, 1), generator=generator)
    items = (first + torch.arange(8)) % ITEMS
    held = (torch.arange(8) == (lengths - 1).unsqueeze(1)) & hold
    return Histories(items, lengths, held)


def model(*, dropout: float = 0.0, id_dropout: float = 0.0, kind: str = "attention") -> SequenceModel:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        encoder = history_encoder(kind, 16, capacity=8, dropout=dropout, layers=1)
        return SequenceModel(ItemEncoder(ITEMS, 16, id_dropout=id_dropout), encoder)


def plan(**changes: float) -> Plan:
    settings: dict[str, float] = {"epochs": 4, "batch": 16, "negatives": 12, "learning_rate": 0.01}
    return Plan(**(settings | changes))  # type: ignore[arg-type]


def full_softmax_loss(of: SequenceModel, items: Tensor, learned: Tensor) -> Tensor:
    vectors, bias = of.of_items(torch.arange(ITEMS)), of.bias
    logits = of(items[:, :-1], learned[:, 1:]) @ vectors.T + bias
    return torch.nn.functional.cross_entropy(logits, items[:, 1:][learned[:, 1:]], reduction="sum")


def learned_of(some: Histories) -> Tensor:
    learned = some.mask & ~some.held
    learned[:, 0] = False
    return learned


def test_with_every_item_drawn_the_loss_and_its_gradient_are_the_full_softmaxs() -> None:
    some, one, other = histories(), model(), model()
    learned = learned_of(some)
    loss = SoftmaxLoss(one)(some.items, learned, torch.arange(ITEMS), torch.zeros(ITEMS))
    expected = full_softmax_loss(other, some.items, learned)
    torch.autograd.backward(loss)
    torch.autograd.backward(expected)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)
    for ours, theirs in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5)


def test_the_corrected_partition_is_the_full_one_in_expectation_whatever_negatives_are_drawn_from() -> None:
    torch.manual_seed(0)
    scores = torch.randn(3, ITEMS).double()
    targets = torch.tensor([4, 0, 17])
    own = scores.gather(1, targets.unsqueeze(1)).squeeze(1)
    q = torch.rand(ITEMS).double().add(0.1)
    q /= q.sum()
    drawn = torch.multinomial(q, 20 * 20_000, replacement=True).view(-1, 20)
    estimates = torch.stack(
        [log_partition(scores[:, d], own, (20 * q[d]).log(), d == targets.unsqueeze(1)).exp() for d in drawn]
    )
    error = estimates.std(0) / len(drawn) ** 0.5
    off = (estimates.mean(0) - scores.exp().sum(1)).abs()
    assert bool((off < 4 * error).all())
    uncorrected = torch.stack([scores[:, d].exp().sum(1) + own.exp() for d in drawn[:2_000]]).mean(0)
    assert bool(((uncorrected - scores.exp().sum(1)).abs() > 40 * error).all())


def test_a_target_among_its_own_negatives_counts_once() -> None:
    scores, own = torch.tensor([[1.0, 2.0]]), torch.tensor([1.0])
    found = log_partition(scores, own, torch.zeros(2), torch.tensor([[True, False]]))
    torch.testing.assert_close(found, torch.logsumexp(scores, 1))


def test_training_learns_what_follows_what_and_reports_it_on_held_out_items() -> None:
    some, trained = histories(200), model()
    before = held_out_ndcg(trained, some, plan())
    done = Trainer(trained, some, plan(epochs=12, patience=0)).run()
    after = held_out_ndcg(trained, some, plan())
    assert before is not None
    assert after is not None
    assert after > max(0.8, before)
    assert max(done.scores) == pytest.approx(after)


def test_held_out_items_are_never_learned_from() -> None:
    """Two sets that differ in held-out items alone give the same losses in every epoch but not the same nDCG."""
    one = histories()
    changed = one.items.clone()
    changed[one.held] = (changed[one.held] + 7) % ITEMS
    other = Histories(changed, one.lengths, one.held)
    first, second = model(), model()
    scores = [
        Trainer(trained, some, plan(patience=0)).run().scores for trained, some in ((first, one), (second, other))
    ]
    assert scores[0] != scores[1]
    last = [Trainer(model(), some, plan(epochs=1)) for some in (one, other)]
    for trainer in last:
        trainer.run()
    for a, b in zip(last[0].model.parameters(), last[1].model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_training_stops_when_held_out_items_no_longer_improve_and_keeps_the_best_epoch() -> None:
    some, trained = histories(200), model()
    done = Trainer(trained, some, plan(epochs=60, patience=2)).run()
    assert done.epochs == done.best_epoch + 2
    assert held_out_ndcg(trained, some, plan()) == pytest.approx(done.scores[done.best_epoch - 1])


def test_without_a_held_out_period_the_newest_epoch_is_kept() -> None:
    done = Trainer(model(), histories(hold=False), plan(epochs=5)).run()
    assert (done.epochs, done.best_epoch) == (5, 5)


def test_the_same_seed_gives_the_same_model_and_another_seed_another() -> None:
    def weights(seed: int) -> Tensor:
        trained = model(dropout=0.3, id_dropout=0.2)
        Trainer(trained, histories(), plan(seed=seed)).run()
        return trained.bias.detach()

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_training_leaves_the_callers_random_numbers_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    Trainer(model(dropout=0.3), histories(), plan(epochs=1)).run()
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("stopped_after", [1, 3])
def test_a_resumed_run_ends_bit_for_bit_as_one_that_was_never_stopped(tmp_path: Path, stopped_after: int) -> None:
    settings = plan(epochs=5, patience=0)
    whole, half, resumed = (model(dropout=0.3, id_dropout=0.2) for _ in range(3))
    expected = Trainer(whole, histories(), settings).run()
    Trainer(half, histories(), settings, checkpoint=tmp_path).run(until=stopped_after)
    done = Trainer(resumed, histories(), settings, checkpoint=tmp_path).run()
    assert done.scores == expected.scores
    for ours, theirs in zip(resumed.state_dict().values(), whole.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_checkpoint_is_tensors_and_json_and_one_of_each(tmp_path: Path) -> None:
    Trainer(model(), histories(), plan(epochs=3, patience=0), checkpoint=tmp_path).run()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["training-3.safetensors", "training.json"]
    assert json.loads((tmp_path / "training.json").read_text())["state"]["epochs"] == 3


def test_a_checkpoint_of_another_plan_is_refused(tmp_path: Path) -> None:
    Trainer(model(), histories(), plan(), checkpoint=tmp_path).run(until=1)
    with pytest.raises(SettingsError, match="another plan or history"):
        Trainer(model(), histories(), plan(learning_rate=0.5), checkpoint=tmp_path).run()


def test_a_checkpoint_of_another_model_or_a_torn_one_is_refused(tmp_path: Path) -> None:
    Trainer(model(), histories(), plan(), checkpoint=tmp_path).run(until=1)
    with pytest.raises(SettingsError, match="another model or torn"):
        Trainer(model(kind="gru"), histories(), plan(), checkpoint=tmp_path).run()
    (tmp_path / "training-1.safetensors").write_bytes(b"torn")
    with pytest.raises(SettingsError, match="another model or torn"):
        Trainer(model(), histories(), plan(), checkpoint=tmp_path).run()


@pytest.mark.parametrize("card", [b"", b"{}", b'{"plan": {}, "state": 3}'])
def test_a_torn_card_of_a_checkpoint_is_refused(tmp_path: Path, card: bytes) -> None:
    Trainer(model(), histories(), plan(), checkpoint=tmp_path).run(until=1)
    (tmp_path / "training.json").write_bytes(card)
    with pytest.raises(SettingsError, match="another model or torn"):
        Trainer(model(), histories(), plan(), checkpoint=tmp_path).run()


def test_histories_without_any_target_are_refused() -> None:
    lonely = Histories(torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, dtype=torch.int64), torch.zeros(3, 1) > 0)
    with pytest.raises(SettingsError, match="two or more examples"):
        Trainer(model(), lonely, plan())


def test_progress_goes_from_nothing_to_everything() -> None:
    shares: list[float] = []
    Trainer(model(), histories(), plan(), progress=lambda _what, share: shares.append(share)).run()
    assert shares[0] == 0.0
    assert shares[-1] == 1.0
    assert shares == sorted(shares)


def test_an_empty_history_has_the_vector_zero_and_batch_mates_make_no_difference() -> None:
    some, trained = histories(), model()
    emptied = Histories(some.items, some.lengths * (torch.arange(40) > 0), some.held)
    users = trained.users(emptied)
    assert bool((users[0] == 0).all())
    torch.testing.assert_close(users[7:9], trained.users(emptied.take(torch.tensor([7, 8]))), rtol=1e-4, atol=1e-5)


WORKER = """
import sys
import torch
from innerloop.learning.processes import join_processes
from innerloop.learning.softmax_training import Trainer
from test_softmax_training import histories, model, plan
torch.set_num_threads(1)
join_processes()
trained = model()
done = Trainer(trained, histories(41), plan(epochs=2, batch=10)).run()
if int(__import__("os").environ["RANK"]) == 0:
    torch.save({"scores": done.scores, "state": trained.state_dict()}, sys.argv[1])
torch.distributed.destroy_process_group()
"""


def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    """Also with a last batch of one task, of which the second process gets none."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    environment = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment |= {
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": str(Path(__file__).parent),
    }
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path / "two.pt")], env=environment | {"RANK": str(rank)}
        )
        for rank in range(2)
    ]
    try:
        assert [worker.wait(timeout=100) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
    two = torch.load(tmp_path / "two.pt", weights_only=True)
    one = model()
    done = Trainer(one, histories(41), plan(epochs=2, batch=10)).run()
    assert two["scores"] == pytest.approx(done.scores, abs=1e-3)
    # Outputs, not parameters: attention's key bias has no effect and no gradient but rounding, which Adam scales up.
    other = model()
    other.load_state_dict(two["state"])
    torch.testing.assert_close(other.users(histories()), one.users(histories()), rtol=1e-3, atol=1e-4)
    for ours, theirs in zip(other.table(), one.table(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_learns_what_the_cpu_does() -> None:
    cpu, gpu = model(), model().to("cuda")
    for trained in (cpu, gpu):
        Trainer(trained, histories(), plan(epochs=2)).run()
    torch.testing.assert_close(gpu.bias.detach().cpu(), cpu.bias.detach(), rtol=1e-2, atol=1e-3)
