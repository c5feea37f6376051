"""`innerloop evaluate PROTOCOL` from the command line, on small files made here."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from shell import Shell

from innerloop.evaluation.shop import Process, Shop

pytestmark = pytest.mark.timeout(1_800)
_SECONDS = 1_700.0
START = 1_750_000_000_000
HEADS = {"bayes", "anil", "cavia", "maml", "reptile"}


def _shop(path: Path, events: int = 600) -> None:
    process = Process(categories=6, sessions_per_hour=20.0, purchase_rate=0.3)
    Shop(2, users=30, items=60, process=process).history(events).write_parquet(path)


def _searches(path: Path) -> None:
    """Users look at one of five shown items and mostly choose it."""
    rng = np.random.default_rng(0)
    found = []
    for session in range(60):
        shown = rng.permutation(20)[:5].tolist()
        looked = shown[int(rng.integers(5))]
        common = {"user_id": session % 10, "session_id": session, "action_type": "look"}
        time = START + session * 600_000
        found += [
            common | {"ts_ms": time, "item_id": looked},
            common | {"ts_ms": time + 1_000, "item_id": looked if session % 3 else shown[0], "impressions": shown},
        ]
    pl.DataFrame(found, infer_schema_length=None).write_parquet(path)


def _ratings(folder: Path) -> None:
    """Each user likes items of one genre; the last users and items are cold."""
    rng = np.random.default_rng(0)
    users, items = np.nonzero(rng.random((60, 45)) < 0.6)
    ratings = np.clip(3 + np.where(users % 3 == items % 3, 1, -1) + rng.integers(-1, 2, len(users)), 1, 5)
    table = pl.DataFrame({"user_id": users, "item_id": items, "rating": ratings})
    new = pl.col("user_id") >= 45, pl.col("item_id") >= 30
    folder.mkdir()
    for name, some in {
        "meta_training": table.filter(~new[0] & ~new[1]),
        "user_cold_testing": table.filter(new[0] & ~new[1]),
        "item_cold_testing": table.filter(~new[0] & new[1]),
        "users": pl.DataFrame({"user_id": range(60)}),
        "items": pl.DataFrame({"item_id": range(45), "genre": [f"g{item % 3}" for item in range(45)]}),
    }.items():
        some.write_csv(folder / f"{name}.csv")


def _is_one_sentence(errors: str) -> bool:
    """Behind what the progress bar left."""
    said = [line for line in errors.splitlines() if line.startswith("innerloop: ")]
    return len(said) == 1 and errors.endswith(f"{said[0]}\n") and "Traceback" not in errors


def _report(shell: Shell, *command: str) -> dict[str, dict[str, float]]:
    """Run it; the figures of the slice `all`, by arm and metric."""
    started = shell.start("evaluate", *command, "--report", "out", "--draws", "20")
    done = shell.finish(started, seconds=_SECONDS)
    assert done.code == 0, done.err
    assert "report.html" in done.out
    assert "<table>" in (shell.folder / "out" / "report.html").read_text()
    found: dict[str, dict[str, float]] = {}
    for row in json.loads((shell.folder / "out" / "report.json").read_text())["rows"]:
        if row["slice"] == "all":
            found.setdefault(row["arm"], {})[row["metric"]] = row["value"]
    return found


def test_ratings_of_the_cold_are_judged(bare_shell: Shell) -> None:
    _ratings(bare_shell.folder / "ratings")
    found = _report(bare_shell, "cold-start", "--data", "ratings")
    assert set(found) >= {"default", "none", "placebo", "placebo - none", "popularity-in-category", *HEADS}
    assert {f"{head} - none" for head in HEADS} <= set(found)
    assert found["default"]["mae"] < found["placebo"]["mae"]


def test_last_items_are_judged_of_as_many_users_as_one_likes(bare_shell: Shell) -> None:
    (bare_shell.folder / "sequences").mkdir()
    rng = np.random.default_rng(0)
    rows = [
        (f"u{user}", at, int(rng.integers(30)) if rng.random() < 0.2 else user + at)
        for user in range(60)
        for at in range(6)
    ]
    table = pl.DataFrame(rows, schema=["user_id", "position", "item_id"], orient="row")
    for name, part in (("a", table.head(100)), ("b", table.slice(100))):
        part.write_parquet(bare_shell.folder / "sequences" / f"{name}.parquet")
    options = "--data", "sequences", "--dimension", "8", "--epochs", "1", "--users", "40"
    found = _report(bare_shell, "sequence", *options)
    assert set(found) >= {"default", "none", "placebo", "placebo - none", "ease", "sasrec", *HEADS}
    facts = json.loads((bare_shell.folder / "out" / "report.json").read_text())["facts"]
    assert facts["users with more, drawn for the test"] == "40 of 60"


def test_choices_from_lists_are_judged(bare_shell: Shell) -> None:
    _searches(bare_shell.folder / "searches.parquet")
    found = _report(bare_shell, "slate", "--data", "searches.parquet", "--most", "20")
    assert set(found) >= {"default", "none", "placebo", "placebo - none", "popularity-1h", "vsknn", "ials", *HEADS}
    assert found["default"]["mrr"] > found["shown-order"]["mrr"]


def test_conversions_are_judged(bare_shell: Shell) -> None:
    _shop(bare_shell.folder / "shop.parquet", 1_500)
    found = _report(bare_shell, "conversion", "--data", "shop.parquet", "--window-hours", "1")
    assert set(found) >= {"default", "none", "placebo", "placebo - none", "streaming-counts", "category-rate", *HEADS}
    assert set(found["default"]) == {"auc", "log-loss", "calibration-error", "predicted/observed"}


@pytest.mark.parametrize(("preset", "slices"), [("globo", {"support 1-2"}), ("taobao", {"click", "purchase"})])
def test_presets_are_judged_on_any_shop(bare_shell: Shell, preset: str, slices: set[str]) -> None:
    _shop(bare_shell.folder / "shop.parquet")
    options = "--preset", preset, "--every", "2", "--sequence", "off"
    found = _report(bare_shell, "stream", "--data", "shop.parquet", *options)
    assert set(found) >= {"default", "none", "placebo", "placebo - none", "popularity", "vsknn", "sasrec", *HEADS}
    rows = json.loads((bare_shell.folder / "out" / "report.json").read_text())["rows"]
    assert slices <= {row["slice"] for row in rows}


@pytest.mark.parametrize("protocol", ["stream", "conversion", "sequence", "slate", "cold-start"])
def test_a_missing_file_is_one_sentence(bare_shell: Shell, protocol: str) -> None:
    done = bare_shell.finish(
        bare_shell.start("evaluate", protocol, "--data", "absent", "--report", "out"), seconds=_SECONDS
    )
    assert done.code == 2
    assert _is_one_sentence(done.err)


def test_a_warm_up_beside_a_history_is_refused(bare_shell: Shell) -> None:
    _shop(bare_shell.folder / "shop.parquet", 50)
    given = "--data", "shop.parquet", "--history", "shop.parquet", "--warm-up", "9", "--report", "out"
    done = bare_shell.finish(bare_shell.start("evaluate", "stream", *given), seconds=_SECONDS)
    assert done.code == 2
    assert _is_one_sentence(done.err)
    assert "--warm-up" in done.err


@pytest.mark.parametrize("protocol", ["stream", "conversion", "sequence", "slate", "cold-start"])
def test_a_report_that_cannot_be_written_is_one_sentence_before_anything_is_read(
    bare_shell: Shell, protocol: str
) -> None:
    (bare_shell.folder / "file").touch()
    done = bare_shell.finish(
        bare_shell.start("evaluate", protocol, "--data", "absent", "--report", "file"), seconds=_SECONDS
    )
    assert done.code == 2
    assert _is_one_sentence(done.err)
    assert "--report" in done.err


def test_a_column_of_another_name_is_mapped_as_the_sentence_about_it_says(bare_shell: Shell) -> None:
    _shop(bare_shell.folder / "shop.parquet", 50)
    table = pl.read_parquet(bare_shell.folder / "shop.parquet").rename({"item_id": "thing"})
    table.write_parquet(bare_shell.folder / "shop.parquet")
    given = "evaluate", "stream", "--data", "shop.parquet", "--report", "out"
    done = bare_shell.finish(bare_shell.start(*given), seconds=_SECONDS)
    assert done.code == 2
    assert _is_one_sentence(done.err)
    assert "map one with --column item_id=NAME" in done.err
    done = bare_shell.finish(bare_shell.start(*given, "--column", "item_id=thing"), seconds=_SECONDS)
    assert _is_one_sentence(done.err)
    assert "training needs 100 or more" in done.err
