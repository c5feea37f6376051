"""Conversion: the chance that a click is followed by a purchase of its item by the same user within the window.

The clicks before the cut less the window train: their labels have matured by the cut. Every click after the cut is
scored in order of time, from what had happened strictly before it; a purchase is known from its own time on, a click
counts as a negative an hour after it, until a purchase says otherwise. Arms:

    default            as adapt publishes it, by a release that is trained again every day (see served.py): its rates
                       and its calibration, and what was known when the user's event before came in; `live`, like the
                       two below, where the events before the cut teach no ad model
    placebo            the same with another user's events, where there is one
    stale-1h, -1d      the same with the user's events as known an hour, a day earlier
    live               the same model with everybody's rates up to the click itself, learned once, at the cut
    shared             `live` with everybody's weights
    bayes, anil, cavia, maml, fomaml, reptile   heads on what the user's own weights act on in `live` (see heads.py)
    none               everybody's rates alone, up to the click, weights fitted for just that
    global-rate, item-rate, category-rate, logistic (online, hashed), streaming-counts (logistic regression on counts
                       and rates)

Probabilities of all but those that adapt publishes are calibrated again every day of the data, on the clicks since the
training part whose labels have matured.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from innerloop.errors import SettingsError
from innerloop.evaluation.conversion import baselines
from innerloop.evaluation.conversion.heads import EPISODES, Clicks, teach
from innerloop.evaluation.conversion.heads import logits as head_logits
from innerloop.evaluation.conversion.log import read_log
from innerloop.evaluation.conversion.served import served
from innerloop.evaluation.conversion.statistics import Auc, CalibrationError
from innerloop.evaluation.event_table import spanned
from innerloop.evaluation.metrics import log_loss, predicted_over_observed
from innerloop.evaluation.outcome import Bools, Floats, Ints, Outcome, Tell
from innerloop.learning.ads.ad_head import VARIANCES, AdHead, choose_variance
from innerloop.learning.ads.attribution import DAY, HOUR
from innerloop.learning.ads.calibration import Platt
from innerloop.learning.ads.click_log import (
    ConversionLog,
    Histories,
    Population,
    adapted,
    content_prior,
    overall_rate,
    own_columns,
    population,
    rows_of,
)

SIZES = {"0": (0, 0), "1-2": (1, 2), "3-5": (3, 5), "6-10": (6, 10), "11-20": (11, 20), "21+": (21, 1 << 62)}
_FEWEST = 50
_MOST = 300_000  # newest clicks that train
_LEAST = 1e-7
_ALONE = "all clicks that are scored are one user's"
_LONGEST = 8_760 * HOUR  # as `learning.attribution_hours` may be


def run(
    data: Path,
    *,
    seed: int,
    tell: Tell,
    window_hours: float = 24.0,
    train_share: float = 0.7,
    columns: Mapping[str, str] | None = None,
) -> Outcome:
    """Judge every arm on the clicks after the first `train_share` of the time span of `data` (a file or a folder).

    `columns` maps names, as in `event_table.read_events`.

    Raises SettingsError when the data cannot be read, or holds too few clicks or conversions to train on or to score.
    """
    if not 0.0 < train_share < 1.0:
        raise SettingsError(f"The training share is {train_share}: give one between 0 and 1.")
    if not 1 <= window_hours * HOUR <= _LONGEST:
        raise SettingsError(f"The attribution window is {window_hours} h: give a millisecond to a year (8760 h).")
    window = int(window_hours * HOUR)
    tell("reading", 0.0)
    log = read_log(data, window=window, columns=columns, seed=seed)
    cut = int(log.times[0] + train_share * (log.times[-1] - log.times[0]))
    case = _Case.of(log, cut, window, data)
    tell("counting", 0.1)
    everybody = population(log, log.clicks, content_prior(log, cut - window))
    own = own_columns(
        log, log.clicks, case.histories.before(log.users[log.clicks], log.times[log.clicks]), everybody.rate
    )
    tell("fitting", 0.4)
    fitted = _fit(case, everybody, own, seed)
    tell("as served", 0.6)
    published = _served(case, seed)
    tell("scoring", 0.65)
    asked = _asked_of(case, case.at, seed)
    # What is served has controls of its own: of `live` they are asked for only where it stands in.
    logits = _live(case, fitted, everybody, own, {"default": asked["default"]} if published else asked)
    tell("heads", 0.7)
    clicks = Clicks(log, case.histories, torch.from_numpy(np.concatenate([own, everybody.columns], 1)))
    heads = teach(clicks, case.train, case.labels[case.train], seed=seed)
    logits |= head_logits(clicks, fitted.head, heads, case.asked)
    predictions = {arm: _calibrated(case, given) for arm, given in logits.items()} | published
    tell("baselines", 0.8)
    predictions |= _baselines(case)
    return _outcome(case, fitted, predictions, own, served=bool(published))


@dataclass(frozen=True)
class _Case:
    """The log, which of its clicks train and which are asked about, as positions in `log.clicks`.

    Asked about are all later clicks; those before the cut only help to calibrate.
    """

    log: ConversionLog
    cut: int
    window: int
    train: Ints
    asked: Ints
    histories: Histories

    @classmethod
    def of(cls, log: ConversionLog, cut: int, window: int, data: Path) -> "_Case":
        times = log.times[log.clicks]
        train, asked = np.flatnonzero(times < cut - window), np.flatnonzero(times >= cut - window)
        case = cls(log, cut, window, train[-_MOST:], asked, Histories(log))
        sold, judged = int(case.labels[case.train].sum()), int(case.judged.sum())
        if len(train) < _FEWEST or not 0 < sold < len(case.train) or not judged:
            raise SettingsError(
                f"{data} has {len(train)} clicks to train on ({sold} of them sold) and {judged} to score: at "
                f"least {_FEWEST}, one sale and 1 are needed, so give a longer log or another training share."
            )
        return case

    @property
    def labels(self) -> Floats:
        """Whether each click converted, by the end of the data: what is judged by and, matured, trained on."""
        return np.asarray(self.log.attribution.converted_at[self.log.clicks] <= self.log.times[-1], np.float64)

    @property
    def at(self) -> Ints:
        """Places in the log of the clicks that are asked about."""
        return self.log.clicks[self.asked]

    @property
    def judged(self) -> Bools:
        """Which of those asked about are after the cut."""
        return self.log.times[self.at] >= self.cut


@dataclass(frozen=True)
class _Fitted:
    head: AdHead
    nobody: Floats  # logits of every click asked about by everybody's rates alone
    losses: Mapping[float, float]  # by how much users may differ, on the last part of the training clicks


def _fit(case: _Case, everybody: Population, own: Floats, seed: int) -> _Fitted:
    columns = torch.from_numpy(np.concatenate([own, everybody.columns], 1))[case.train]
    labels = torch.from_numpy(case.labels[case.train])

    def foretell(heads: Sequence[AdHead], last: slice) -> list[Tensor]:
        features = heads[0].own_features(columns)
        at = case.log.clicks[case.train[last]]
        windows = case.histories.before(case.log.users[at], case.log.times[at])
        rows = rows_of(case.log, case.log.clicks[case.train])
        logits = (adapted(case.log, head, features, rows, windows, features[last]) for head in heads)
        return [torch.from_numpy(each) for each in logits]

    variance, losses = choose_variance(columns, labels, foretell, seed=seed)
    head = AdHead.fit(columns, labels, seed=seed).with_variance(variance)
    alone = baselines.fit_and_predict(everybody.columns[case.train], labels.numpy(), everybody.columns[case.asked])
    return _Fitted(head, np.log(alone / (1 - alone)), dict(zip(VARIANCES, losses, strict=False)))


_Asked = dict[str, tuple[Ints, int]]


def _asked_of(case: _Case, at: Ints, seed: int) -> _Asked:
    """For each arm whose events are looked at [M], and how much older (ms) they are than the clicks `at` [M]."""
    users = case.log.users[at]
    asked = {"default": (users, 0), "stale-1h": (users, HOUR), "stale-1d": (users, DAY)}
    if (strangers := _strangers(users, seed)) is not None:
        asked["placebo"] = strangers, 0
    return asked


def _live(case: _Case, fitted: _Fitted, everybody: Population, own: Floats, whose: _Asked) -> dict[str, Floats]:
    """Logits of the clicks asked about: `live`, and as the arms of `_asked_of` that it stands in for."""
    log, at = case.log, case.at
    support = fitted.head.own_features(torch.from_numpy(np.concatenate([own, everybody.columns], 1)))
    rate, columns = everybody.rate[case.asked], everybody.columns[case.asked]
    found = {}
    for arm, (users, lag) in whose.items():
        windows = case.histories.before(users, log.times[at] - lag)
        mine = own[case.asked] if arm == "default" else own_columns(log, at, windows, rate, lag=lag)
        asked = fitted.head.own_features(torch.from_numpy(np.concatenate([mine, columns], 1)))
        found[arm] = adapted(log, fitted.head, support, rows_of(log, log.clicks), windows, asked)
    shared = support[case.asked, 0].numpy()
    return {"default": found["default"], "live": found["default"], "shared": shared, "none": fitted.nobody} | found


def _served(case: _Case, seed: int) -> dict[str, Floats]:
    """What adapt publishes, to the user and as controls, of all clicks asked about: NaN before the cut."""
    log, at = case.log, case.at[case.judged]
    asked = {arm: (users, log.times[at] - lag) for arm, (users, lag) in _asked_of(case, at, seed).items()}
    found = {}
    for arm, chances in served(log, at, asked, case.cut, window=case.window, seed=seed).items():
        found[arm] = np.full(len(case.at), np.nan)
        found[arm][case.judged] = np.clip(chances, _LEAST, 1 - _LEAST)
    return found


def _strangers(users: Ints, seed: int) -> Ints | None:
    """For each moment another user, drawn from all that are scored; None where there is only one."""
    distinct = np.unique(users)
    if len(distinct) == 1:
        return None
    own = np.searchsorted(distinct, users)
    moved = own + np.random.default_rng(seed).integers(1, len(distinct), len(users))
    return np.asarray(distinct[moved % len(distinct)], np.int64)


def _calibrated(case: _Case, logits: Floats) -> Floats:
    """Probabilities [M]: Platt's scaling of each day's clicks, fitted on the scored clicks that matured before it."""
    times, labels = case.log.times[case.at], case.labels[case.asked]
    found = np.empty(len(logits))
    day = (times - case.cut) // DAY
    for number in np.unique(day):
        start = case.cut + number * DAY
        matured = times < start - case.window
        scaling = Platt.fit(torch.from_numpy(logits[matured]), torch.from_numpy(labels[matured]))
        found[day == number] = scaling(torch.from_numpy(logits[day == number])).numpy()
    return np.clip(found, _LEAST, 1 - _LEAST)


def _baselines(case: _Case) -> dict[str, Floats]:
    log, at = case.log, case.at
    counted = baselines.counts(log, log.clicks)
    prior = content_prior(log, case.cut - case.window)
    found = {
        "global-rate": overall_rate(log, at),
        "item-rate": baselines.item_rate(log, at, prior),
        "category-rate": baselines.category_rate(log, at, prior),
        "streaming-counts": baselines.fit_and_predict(
            counted[case.train], case.labels[case.train], counted[case.asked]
        ),
        "logistic": baselines.online_logistic(log, at),
    }
    if (log.categories < 0).all():
        del found["category-rate"]
    return {arm: _calibrated(case, _logit(predicted)) for arm, predicted in found.items()}


def _logit(probabilities: Floats) -> Floats:
    known = np.clip(probabilities, _LEAST, 1 - _LEAST)
    return np.asarray(np.log(known / (1 - known)), np.float64)


_BASELINES = frozenset({"global-rate", "item-rate", "category-rate", "streaming-counts", "logistic"})


def _outcome(case: _Case, fitted: _Fitted, predictions: Mapping[str, Floats], own: Floats, *, served: bool) -> Outcome:
    log, judged = case.log, case.judged
    labels, trained = case.labels[case.asked][judged], case.labels[case.train]
    return Outcome(
        users=log.users[case.at][judged],
        baselines=_BASELINES,
        slices=_slices(case),
        labels=labels,
        predictions={arm: predicted[judged] for arm, predicted in predictions.items()},
        pooled={
            "auc": Auc(),
            "log-loss": log_loss,
            "calibration-error": CalibrationError(),
            "predicted/observed": predicted_over_observed,
        },
        smaller_is_better=frozenset({"log-loss", "calibration-error"}),
        undirected=frozenset({"predicted/observed"}),  # best at 1
        release="fitted on the training part",
        facts={
            "default": "as adapt publishes it, trained again every day"
            if served
            else "`live`: the events before the cut teach no ad model",
            "calibration": "Platt's scaling, again every day, on clicks that had matured; what is served has its own",
            "trained once, on the training part": "all but what is served; rates, counts and `logistic` go on by click",
            "clicks whose window the data ends in": int(
                (log.times[case.at[judged]] + case.window > log.times[-1]).sum()
            ),
            "times": spanned(log.times),
            "trained_on": len(case.train),
            "trained_on_sold": int(trained.sum()),
            "scored": len(labels),
            "scored_sold": int(labels.sum()),
            "window_hours": case.window / HOUR,
            "cut_ms": case.cut,
            "variance of users' own weights": float(fitted.head.own_variances[0]),
            "log-loss by that variance": {str(key): round(value, 5) for key, value in fitted.losses.items()},
            "columns": own.shape[1],
            "episodes of the heads at most": EPISODES,
            **({} if "placebo" in predictions else {"left out": {"placebo": _ALONE}}),
        },
    )


def _slices(case: _Case) -> dict[str, Bools]:
    """By the size of the support set, by day after the cut, and the clicks whose window ends inside the data."""
    log, at = case.log, case.at[case.judged]
    sizes = case.histories.before(log.users[at], log.times[at]).mask.sum(1)
    found: dict[str, Bools] = {
        f"support {name}": (sizes >= low) & (sizes <= high) for name, (low, high) in SIZES.items()
    }
    day = (log.times[at] - case.cut) // DAY
    found |= {f"day {int(number) + 1}": day == number for number in np.unique(day)}
    return found | {"window complete": log.times[at] + case.window <= log.times[-1]}
