"""Every metric, declared once.

Names are as Prometheus shows them; a counter's name gets `_total` there. What `innerloop lag` and the console say is
computed from the same numbers, so that all three agree.
"""

import time

from prometheus_client import Counter, Gauge, Histogram

_STEPS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_LATENCIES = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2, 5, 10, 30, 60, 300)
_WHERE = ["group", "topic", "partition"]

# --- what comes in

# Event records by what became of them: stored, duplicate, too_late, dead_letter, replayed (already in Postgres),
# suppressed (of a user who was erased), dropped (impressions where none are kept).
EVENTS = Counter("innerloop_events", "Event records handled, by outcome", ["outcome"])
DEAD_LETTERS = Counter("innerloop_dead_letters", "Records sent to the dead-letter topic, by reason", ["reason"])
BREAKER_STOPS = Counter("innerloop_breaker_stops", "Times the breaker stopped the worker: most records were bad")

# --- what goes through

# Coalescing factor: polled requests / adapted tasks.
REQUESTS = Counter("innerloop_requests", "Adaptation requests, by step: sent, polled, coalesced", ["step"])
ADAPTED = Counter("innerloop_tasks_adapted", "Users whose scores were computed anew")
ADAPTATION_SECONDS = Counter(
    "innerloop_adaptation_seconds", "Time spent on reading, solving, scoring and publishing; per user: / tasks adapted"
)
SCORES = Counter("innerloop_scores", "Score records published, by model", ["model"])
REPAIRS = Counter("innerloop_score_repairs", "Users adapted again over a stranger's record on a score topic")
EVENT_TO_SCORE = Histogram(
    "innerloop_event_to_score_seconds",
    "From the oldest event record of a batch being on the topic to its users' scores being acknowledged",
    buckets=_LATENCIES,
)
# Its two halves; every batch counts once.
EVENT_TO_STORED = Histogram(
    "innerloop_event_to_stored_seconds",
    "From the oldest event record of a batch being on the topic to its support sets being committed",
    buckets=_LATENCIES,
)
REQUEST_TO_SCORE = Histogram(
    "innerloop_request_to_score_seconds",
    "From the oldest request of a batch being on the topic to its users' scores being acknowledged",
    buckets=_LATENCIES,
)

# --- how far behind, by committed offsets, as any tool outside sees it

LAG_OFFSETS = Gauge("innerloop_lag_offsets", "Offsets of the partition that are not yet committed", _WHERE)
# Of a request the age of the event behind it; 0 while no record waits, whatever offsets marks of transactions have.
LAG_SECONDS = Gauge("innerloop_lag_seconds", "Age of the oldest event of the partition that is not committed", _WHERE)

# --- where the time goes

# Seconds in each step of a batch: poll, decode, database, merge, publish, read, trends, solve, score (the head over the
# catalogue), sequence (the sequence model over the histories), candidates, rank, ads, encode; wait is time paused for
# the database or the broker.
STEP_SECONDS = Histogram("innerloop_step_seconds", "Time of one step of one batch", ["step"], buckets=_STEPS)
BATCH_SIZE = Histogram("innerloop_batch_records", "Records in one batch", buckets=tuple(4**n for n in range(10)))
GPU_MEMORY = Gauge("innerloop_gpu_memory_bytes", "Memory that this process holds on its GPU", ["device"])
GPU_BUSY = Gauge("innerloop_gpu_busy_ratio", "Share of the last second in which the GPU worked", ["device"])

# --- what it is like

MODEL_VERSION = Gauge("innerloop_model_version", "Version of the release in use")
CONFLICTS = Counter("innerloop_support_conflicts", "Batches merged again because a user had another writer")
REBALANCES = Counter("innerloop_rebalances", "Rebalance callbacks, by kind: assigned, revoked, lost", ["kind"])
PASSED_OVER = Counter("innerloop_passed_over", "Times that the Kafka client passed over records, which were read again")
PAUSES = Counter("innerloop_pauses", "Tries that ended in a wait for the database or the broker")
PARTITIONS = Gauge("innerloop_partitions", "Partitions that this process owns")
LAST_TURN = Gauge("innerloop_last_turn_timestamp_seconds", "When the loop last turned (epoch)")
CONSOLE_LOOKED = Gauge("innerloop_console_looked_timestamp_seconds", "When the console last knew the lag (epoch)")

# --- quality, by arm (adapted, hold_out, placebo), of the newest closed window

# One process shows them: the one that closes the windows. What that window doesn't have is not shown, and nothing when
# no window was closed for some time: one without clicks is none.
QUALITY_WINDOW_END = Gauge(
    "innerloop_quality_window_end_timestamp_seconds", "End of the newest closed window, by its events' time; 0: none"
)
QUALITY_HIT_RATE = Gauge("innerloop_quality_hit_rate", "Share of clicks that were among the first k", ["arm", "k"])
QUALITY_MRR = Gauge("innerloop_quality_mrr", "Mean reciprocal rank of clicks among the first k", ["arm", "k"])
QUALITY_LIFT = Gauge("innerloop_quality_lift", "Hit rate of the adapted minus that of the hold-out", ["k"])
QUALITY_LIFT_LOW = Gauge("innerloop_quality_lift_low", "Lower end of the lift's 95% interval", ["k"])
QUALITY_LIFT_HIGH = Gauge("innerloop_quality_lift_high", "Upper end of the lift's 95% interval", ["k"])
QUALITY_CLICKS = Gauge("innerloop_quality_clicks", "Clicks that were judged", ["arm"])
QUALITY_USERS = Gauge("innerloop_quality_users", "Users whose clicks were judged", ["arm"])
# By why: late (for a window that had been closed, since the last one), without_list (none was published before).
QUALITY_UNJUDGED = Gauge("innerloop_quality_unjudged_clicks", "Clicks of the sample that were not judged", ["why"])
QUALITY_AD_CLICKS = Gauge("innerloop_quality_ad_clicks", "Clicks on ads whose attribution ended in the window", ["arm"])
QUALITY_AD_AUC = Gauge("innerloop_quality_ad_auc", "AUC of the ads' scores", ["arm"])
QUALITY_AD_CALIBRATION = Gauge("innerloop_quality_ad_calibration_ratio", "Predicted / observed, of the ads", ["arm"])
_VERSION = ["arm", "model_version"]  # of the newest two
QUALITY_VERSION_HIT_RATE = Gauge(
    "innerloop_quality_version_hit_rate", "Share of clicks that were among the first k", [*_VERSION, "k"]
)
QUALITY_VERSION_CLICKS = Gauge("innerloop_quality_version_clicks", "Clicks that were judged", _VERSION)


def observe_since(histogram: Histogram, epoch_ms: int) -> None:
    """Observe how long ago this was, where it is known."""
    if epoch_ms > 0:
        histogram.observe(max(0.0, time.time() - epoch_ms / 1000))
