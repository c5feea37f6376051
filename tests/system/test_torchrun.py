"""`innerloop train` by two processes, on a real Kafka and PostgreSQL."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
from shell import Shell

from innerloop.config import Settings
from innerloop.learning.releases import load
from innerloop.store import releases
from innerloop.store.database import connect, transaction


def circles(path: Path) -> Path:
    """Users who mostly go from item n to item n + 1, each event after everybody's event before."""
    rng = np.random.default_rng(0)
    users, steps = 150, 10
    at = rng.integers(40, size=users)
    rows = []
    for step in range(steps):
        at = np.where(rng.random(users) < 0.9, (at + 1) % 40, rng.integers(40, size=users))
        rows += [("click", f"u{user}", f"i{at[user]}", 10**12 + step * 600_000 + user * 100) for user in range(users)]
    table = pl.DataFrame(rows, schema=["event_type", "user_id", "item_id", "event_time"], orient="row")
    table.write_parquet(path)
    return path


def test_two_processes_train_together_and_one_registers_the_release(
    shell: Shell, settings: Settings, tmp_path: Path
) -> None:
    data = circles(tmp_path / "circles.parquet")
    assert shell.run("topics").code == 0
    environment = {
        **shell.environment,
        "OMP_NUM_THREADS": "1",
        "INNERLOOP_LEARNING__SEQUENCE": "pooled",
        "INNERLOOP_LEARNING__SEQUENCE_POSITIONS": "20000",
        "INNERLOOP_LEARNING__DIMENSION": "16",
    }
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "innerloop.worker"]
    done = subprocess.run(
        [sys.executable, *command, "train", "--events", str(data), "--checkpoint", str(tmp_path / "kept")],
        cwd=shell.folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Release 1 at ") == 1
    assert sorted(path.name for path in (shell.folder / "releases").iterdir()) == [
        "release-1.json",
        "release-1.safetensors",
    ]
    engine = connect(settings.database)
    with transaction(engine) as connection:
        newest, following = releases.newest(connection), releases.next_version(connection)
    engine.dispose()
    assert newest is not None
    assert newest.version == 1
    assert following == 2
    release = load(newest.location)
    assert release.sequence is not None
    assert release.card.metrics["sequence_ndcg@10"] > 0.5, "what follows what was learned by both"
    assert not [path for path in (tmp_path / "kept").rglob("*") if path.is_file()], "a finished training leaves nothing"
