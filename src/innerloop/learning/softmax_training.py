"""Meta-training of the encoders by sampled softmax: after each example, foresee the next among all items.

The loss of a target y after a history h is -s_y + log Z with s_v = h . v. Z over the catalogue is estimated from
negatives drawn with probability q, each counted 1 / (number drawn x q), which is the logQ correction:

    Z'  =  exp(s_y) + sum over drawn j != y of exp(s_j - log(M q_j)),    E[Z'] = Z

(importance sampling, Bengio and Senecal 2008; in two-tower recommenders Yi et al. 2019). The same M negatives serve a
whole batch; with M at least the number of items the sum is exact. After each epoch the targets of the held-out period
are ranked among all items, the best epoch so far is kept, and training stops when it no longer improves.

Everything random is drawn from (seed, epoch), so training that was stopped after any epoch and resumed from its
checkpoint ends with the same numbers, bit for bit (on a CPU: a GPU adds up in whatever order comes). Under torchrun
each process takes its share of every batch and gradients are averaged: the result is that of one process, to rounding,
where there is no dropout.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from innerloop.errors import SettingsError
from innerloop.learning.history_head import HistoryHead
from innerloop.learning.item_encoder import ItemContent, ItemEncoder
from innerloop.learning.processes import agreed, processes, rank
from innerloop.learning.whole_file import write_whole

Progress = Callable[[str, float], None]

_RANKED_AT_ONCE = 256
_CUTOFF = 10
_WARM_UP = 0.05
_BEST, _LAST, _FIRST_MOMENT, _SECOND_MOMENT = "best.", "last.", "exp_avg.", "exp_avg_sq."


@dataclass(frozen=True)
class Histories:
    """B tasks' items oldest first, padded at the end. `held` marks those of the held-out period: ranked, not learned.

    A task's first item is never a target. Nothing after a held-out item may be learned from.
    """

    items: Tensor  # [B, S] int64 rows of the item table
    lengths: Tensor  # [B] int64
    held: Tensor  # [B, S] bool

    def __len__(self) -> int:
        return len(self.items)

    @property
    def mask(self) -> Tensor:
        return torch.arange(self.items.shape[1]) < self.lengths.unsqueeze(1)

    def take(self, rows: Tensor) -> "Histories":
        """Those rows, cut to the longest of them."""
        width = max(1, int(self.lengths[rows].max())) if len(rows) else 1
        return Histories(self.items[rows, :width], self.lengths[rows], self.held[rows, :width])


@dataclass(frozen=True)
class Plan:
    """How to train. `negatives` are drawn for each batch, by counts to the power `popularity_power`.

    `content` is a digest of what is learned from: who goes on from a checkpoint must have the same.
    """

    epochs: int = 40
    patience: int = 3
    batch: int = 128
    negatives: int = 2_048
    popularity_power: float = 0.5
    learning_rate: float = 3e-3  # reached after `_WARM_UP` of the epochs, then falling along a cosine to zero
    weight_decay: float = 0.0
    validation_tasks: int = 4_000
    cuts: int = 0
    """Targets that are learned from in a task and epoch, drawn anew; 0: all. A head is solved for each."""
    seed: int = 0
    content: str = ""


class SequenceModel(nn.Module):
    """Items and histories in one space: the score of an item is its vector times the history's, plus its bias.

    With a `head` the history's vector is where the head starts from, and what it makes of it is scored with.
    """

    def __init__(
        self,
        items: ItemEncoder,
        history: nn.Module,
        content: ItemContent | None = None,
        *,
        head: HistoryHead | None = None,
    ) -> None:
        super().__init__()
        self.items, self.history, self.head = items, history, head
        self.bias = nn.Parameter(torch.zeros(items.items))
        self.content = content

    def of_items(self, rows: Tensor) -> Tensor:
        """Vectors of item rows [...] int64, [..., d]."""
        flat = rows.reshape(-1)
        if self.content is not None and self.content.categories.device != flat.device:
            self.content = self.content.to(flat.device)
        content = None if self.content is None else self.content.take(flat)
        vectors: Tensor = self.items(flat, content)
        return vectors.view(*rows.shape, vectors.shape[-1])

    def forward(self, items: Tensor, asked: Tensor) -> Tensor:
        """What comes after those of items [B, S] that are `asked` [B, S] bool, one after another: [P, d]."""
        vectors = self.of_items(items)
        rows, steps = asked.nonzero(as_tuple=True)
        hidden: Tensor = self.history(vectors)[rows, steps]
        return hidden if self.head is None else self.head(hidden, vectors[rows], steps + 1)

    @torch.no_grad()
    def users(self, histories: Histories) -> Tensor:
        """The vector after each history's last item, [B, d]; zero for an empty history."""
        self.eval()
        parts = []
        for rows in torch.split(torch.arange(len(histories)), _RANKED_AT_ONCE):
            some = histories.take(rows)
            newest = torch.arange(some.items.shape[1]) == (some.lengths - 1).clamp(min=0).unsqueeze(1)
            last = self(some.items.to(self.bias.device), newest.to(self.bias.device))
            parts.append(torch.where((some.lengths > 0).unsqueeze(1).to(last.device), last, 0.0))
        return torch.cat(parts) if parts else torch.empty(0, self.items.identifiers.embedding_dim)

    @torch.no_grad()
    def table(self) -> tuple[Tensor, Tensor]:
        """Vectors [N, d] and biases [N] of all items."""
        self.eval()
        return self.of_items(torch.arange(self.items.items, device=self.bias.device)), self.bias.detach()


def log_partition(scores: Tensor, own: Tensor, log_expected: Tensor, same: Tensor) -> Tensor:
    """Estimate log Z [P] from scores [P, M] of the drawn items, own score [P] and log(M q) [M] of the drawn.

    `same` [P, M] marks draws that are the target itself: its score is counted once, as it is.
    """
    corrected = (scores - log_expected).masked_fill(same, -torch.inf)
    return torch.logaddexp(own, torch.logsumexp(corrected, dim=1))


class SoftmaxLoss(nn.Module):
    """The summed loss of a batch; a module, so that gradients of several processes can be averaged by DDP."""

    def __init__(self, model: SequenceModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, items: Tensor, learned: Tensor, drawn: Tensor, log_expected: Tensor) -> Tensor:
        """Sum over the positions of items [B, S] that `learned` [B, S] marks, against items `drawn` [M]."""
        hidden = self.model(items[:, :-1], learned[:, 1:])  # [P, d]
        targets = items[:, 1:][learned[:, 1:]]  # [P]
        candidates, bias = self.model.of_items(drawn), self.model.bias  # [M, d]
        own = (hidden * self.model.of_items(targets)).sum(1) + bias[targets]
        scores = torch.addmm(bias[drawn], hidden, candidates.T)
        loss: Tensor = (log_partition(scores, own, log_expected, drawn == targets.unsqueeze(1)) - own).sum()
        return loss


@dataclass
class Progressed:
    """What a checkpoint's card says: the epochs done and the held-out nDCG after each."""

    epochs: int = 0
    best_epoch: int = 0
    scores: list[float] = field(default_factory=list)
    steps: float = 0.0


class _Card(msgspec.Struct):
    """What a checkpoint is of, and how far it is."""

    plan: dict[str, object]
    state: Progressed


class _Draw:
    """Negatives by a power of the training counts."""

    def __init__(self, histories: Histories, items: int, plan: Plan) -> None:
        learned = histories.items[histories.mask & ~histories.held]
        counts = torch.bincount(learned, minlength=items).double()
        weights = (counts + 1.0) ** plan.popularity_power
        self.q = (weights / weights.sum()).float()
        self.count, self.items = plan.negatives, items

    def __call__(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Item rows [M] and log(M q) [M]; all items, exactly once, where M is no less than their number."""
        if self.count >= self.items:
            return torch.arange(self.items), torch.zeros(self.items)
        drawn = torch.multinomial(self.q, self.count, replacement=True, generator=generator)
        return drawn, (self.count * self.q[drawn]).log()


class Trainer:
    """One training run of `model` on `histories`.

    `checkpoint` names a directory for `training.safetensors` and `training.json`, written after every epoch and
    resumed from when present. Raises SettingsError when no history has a target to learn from, or the checkpoint is
    another model's or another plan's.
    """

    def __init__(
        self,
        model: SequenceModel,
        histories: Histories,
        plan: Plan,
        *,
        checkpoint: Path | None = None,
        progress: Progress | None = None,
    ) -> None:
        learned = histories.mask & ~histories.held
        learned[:, 0] = False
        if not bool(learned.any()):
            raise SettingsError("No task has two or more examples to learn from: give longer histories.")
        self.model, self.plan, self.histories, self.learned = model, plan, histories, learned
        self.device = model.bias.device
        self.tell = progress or (lambda _what, _share: None)
        self.checkpoint = checkpoint
        self.draw = _Draw(histories, model.items.items, plan)
        self.state = Progressed()
        self.best = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=plan.learning_rate, weight_decay=plan.weight_decay, betas=(0.9, 0.98)
        )
        loss = SoftmaxLoss(model)
        self.loss: nn.Module = DistributedDataParallel(loss) if processes() > 1 else loss

    def run(self, *, until: int | None = None) -> Progressed:
        """Train to the end, or until that many epochs are done; the model then holds its best epoch's parameters."""
        self._resume()
        while self.state.epochs < min(self.plan.epochs, until or self.plan.epochs) and not self._worn_out():
            self._epoch(self.state.epochs)
            self._judge()
            self._save()
        self.model.load_state_dict(self.best)
        self.model.eval()
        self.tell("trained", 1.0)
        return self.state

    def _worn_out(self) -> bool:
        return self.state.epochs - self.state.best_epoch >= self.plan.patience > 0

    def _epoch(self, epoch: int) -> None:
        generator = torch.Generator().manual_seed(self.plan.seed * 1_000_003 + epoch)
        batches = list(self._batches(generator))
        with torch.random.fork_rng():
            torch.manual_seed((self.plan.seed * 1_000_003 + epoch) * 1_009 + rank())
            self.model.train()
            for number, rows in enumerate(batches):
                share = (epoch + number / len(batches)) / self.plan.epochs
                self.tell(f"epoch {epoch + 1} of at most {self.plan.epochs}", share)
                for group in self.optimizer.param_groups:
                    group["lr"] = self.plan.learning_rate * _pace(share)
                self._step(rows, generator)

    def _batches(self, generator: torch.Generator) -> Iterator[Tensor]:
        """Rows of tasks of similar length, in random order: little is padded."""
        able = self.learned.any(1).nonzero().squeeze(1)
        shuffled = able[torch.randperm(len(able), generator=generator)]
        noise = torch.rand(len(able), generator=generator)
        by_length = shuffled[(self.histories.lengths[shuffled] + noise).argsort(stable=True)]
        parts = torch.split(by_length, self.plan.batch)
        for at in torch.randperm(len(parts), generator=generator).tolist():
            yield parts[at]

    def _asked(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Which targets of those tasks are learned from this time, [b, S]."""
        learned = self.learned[rows]
        if not self.plan.cuts:
            return learned
        drawn = torch.rand(learned.shape, generator=generator).masked_fill(~learned, -1.0)
        nth = drawn.argsort(1, descending=True).argsort(1)
        return learned & (nth < self.plan.cuts)

    def _step(self, rows: Tensor, generator: torch.Generator) -> None:
        drawn, log_expected = self.draw(generator)
        asked = self._asked(rows, generator)
        total = int(asked.sum())
        part = slice(rank(), None, processes())
        mine, learned = (rows[part], asked[part]) if len(rows) > rank() else (rows[:1], torch.zeros_like(asked[:1]))
        batch = self.histories.take(mine)
        inputs = (batch.items, learned[:, : batch.items.shape[1]], drawn, log_expected)
        loss = self.loss(*(part.to(self.device) for part in inputs)) * (processes() / total)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()

    def _judge(self) -> None:
        """Keep the parameters if this epoch is the best; without a held-out period the newest are the best."""
        self.state.epochs += 1
        score = held_out_ndcg(self.model, self.histories, self.plan)
        score = None if score is None else agreed(score)
        self.state.scores.append(score if score is not None else 0.0)
        self.tell(f"held-out nDCG@{_CUTOFF} {self.state.scores[-1]:.4f}", self.state.epochs / self.plan.epochs)
        if score is None or score > max(self.state.scores[:-1], default=-1.0):
            self.state.best_epoch = self.state.epochs
            self.best = {name: value.detach().clone() for name, value in self.model.state_dict().items()}

    def _save(self) -> None:
        if self.checkpoint is None or rank() != 0:
            return
        tensors = {_BEST + name: value for name, value in self.best.items()}
        tensors |= {_LAST + name: value for name, value in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            moments = self.optimizer.state[parameter]
            tensors |= {_FIRST_MOMENT + name: moments["exp_avg"], _SECOND_MOMENT + name: moments["exp_avg_sq"]}
            self.state.steps = float(moments["step"])
        card = _Card(msgspec.to_builtins(self.plan), self.state)
        content = safetensors.torch.save({name: value.cpu().contiguous() for name, value in tensors.items()})
        try:
            self.checkpoint.mkdir(parents=True, exist_ok=True)
            write_whole(self.checkpoint / f"training-{self.state.epochs}.safetensors", content)
            write_whole(self.checkpoint / "training.json", msgspec.json.format(msgspec.json.encode(card)))
            for old in self.checkpoint.glob("training-*.safetensors"):
                if old.name != f"training-{self.state.epochs}.safetensors":
                    old.unlink()
        except OSError as error:
            raise SettingsError(f"The checkpoint cannot be written to {self.checkpoint}: {error.strerror}.") from None

    def _resume(self) -> None:
        if self.checkpoint is None or self.state.epochs or not (self.checkpoint / "training.json").is_file():
            return
        try:
            card = msgspec.json.decode((self.checkpoint / "training.json").read_bytes(), type=_Card)
            if card.plan != msgspec.to_builtins(self.plan):
                raise SettingsError(
                    f"{self.checkpoint} is of another plan or history: name another directory or remove it."
                )
            self.state = card.state
            tensors = safetensors.torch.load_file(self.checkpoint / f"training-{self.state.epochs}.safetensors")
            self.best = _named(tensors, _BEST, self.device)
            self.model.load_state_dict(_named(tensors, _LAST, self.device))
            first, second = _named(tensors, _FIRST_MOMENT, self.device), _named(tensors, _SECOND_MOMENT, self.device)
            for name, parameter in self.model.named_parameters():
                moments = {"exp_avg": first[name], "exp_avg_sq": second[name], "step": torch.tensor(self.state.steps)}
                self.optimizer.state[parameter] = moments
        except (OSError, RuntimeError, LookupError, ValueError, safetensors.SafetensorError):
            raise SettingsError(f"{self.checkpoint} is of another model or torn: remove it and train anew.") from None


def held_out_ndcg(model: SequenceModel, histories: Histories, plan: Plan) -> float | None:
    """Mean of `held_out_gains`; None without any."""
    gains = held_out_gains(model, histories, plan)
    return float(gains.mean()) if len(gains) else None


def held_out_gains(model: SequenceModel, histories: Histories, plan: Plan) -> Tensor:
    """nDCG@10 of each held-out target among all items that its history doesn't hold, [Q].

    Of each task only the first held-out target counts, of at most `plan.validation_tasks` tasks.
    """
    held = histories.held & histories.mask
    held[:, 0] = False
    tasks = held.any(1).nonzero().squeeze(1)
    if not len(tasks):
        return torch.empty(0)
    generator = torch.Generator().manual_seed(plan.seed)
    tasks = tasks[torch.randperm(len(tasks), generator=generator)[: plan.validation_tasks]]
    at = held[tasks].to(torch.uint8).argmax(1)
    before = Histories(histories.items[tasks], at, histories.held[tasks])
    targets = histories.items[tasks, at]
    vectors, bias = model.table()
    gains = []
    for rows in torch.split(torch.arange(len(tasks)), _RANKED_AT_ONCE):
        some = before.take(rows)
        scores = torch.addmm(bias, model.users(some), vectors.T).cpu()
        own = scores.gather(1, targets[rows].unsqueeze(1))
        above = scores >= own
        seen = torch.where(some.mask, some.items, targets[rows].unsqueeze(1))
        above.scatter_(1, seen, value=False)
        ranks = above.sum(1) + 1.0  # the target itself is not in `above` any more
        gains.append(torch.where(ranks <= _CUTOFF, 1.0 / torch.log2(1.0 + ranks), 0.0))
    return torch.cat(gains)


def _pace(share: float) -> float:
    """The learning rate's factor after that share of all epochs: up in a line, down along a cosine."""
    if share < _WARM_UP:
        return max(share, 1e-3) / _WARM_UP
    return 0.5 + 0.5 * math.cos(math.pi * (share - _WARM_UP) / (1.0 - _WARM_UP))


def _named(tensors: dict[str, Tensor], prefix: str, device: torch.device) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value.to(device) for name, value in tensors.items() if name.startswith(prefix)}
