"""Every metric, declared once."""

from prometheus_client import Counter, Histogram

_STEPS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)

# Event records by what became of them: stored, duplicate, too_late, dead_letter, replayed (already in Postgres).
EVENTS = Counter("innerloop_events", "Event records handled, by outcome", ["outcome"])
DEAD_LETTERS = Counter("innerloop_dead_letters", "Records sent to the dead-letter topic, by reason", ["reason"])
REQUESTS = Counter("innerloop_requests", "Adaptation requests, by step: sent, polled, coalesced", ["step"])
ADAPTED = Counter("innerloop_tasks_adapted", "Users whose scores were computed anew")
SCORES = Counter("innerloop_scores", "Score records published, by model", ["model"])
REPAIRS = Counter("innerloop_score_repairs", "Users adapted again over a stranger's record on a score topic")
# Seconds in each step of a batch: poll, decode, database, merge, publish, read, trends, solve, score (the head over the
# catalogue), candidates, rank, ads, encode.
STEP_SECONDS = Histogram("innerloop_step_seconds", "Time of one step of one batch", ["step"], buckets=_STEPS)
BATCH_SIZE = Histogram("innerloop_batch_records", "Records in one batch", buckets=tuple(4**n for n in range(10)))
CONFLICTS = Counter("innerloop_support_conflicts", "Batches merged again because a user had another writer")
REBALANCES = Counter("innerloop_rebalances", "Rebalance callbacks, by kind: assigned, revoked, lost", ["kind"])
PAUSES = Counter("innerloop_pauses", "Times a batch waited for the database or the broker")
