"""How the demo shows itself: a live table on a terminal, a line a second elsewhere."""

from dataclasses import dataclass

from rich.table import Table


@dataclass(frozen=True)
class Tick:
    """One look at the running loop."""

    seconds: float
    events: int
    total: int | None
    events_per_second: float
    adapted_per_second: float
    lag_offsets: int
    lag_seconds: float
    p50_ms: float
    p99_ms: float
    hit_rates: dict[str, float]
    clicks: int


def table(tick: Tick, source: str) -> Table:
    """The live table."""
    shown = Table(title=f"Innerloop on {source}, {tick.seconds:.0f} s", title_justify="left", show_header=False)
    shown.add_column(style="bold")
    shown.add_column(justify="right")
    shown.add_column(style="dim")
    whole = f"of {tick.total:,}" if tick.total else ""
    rates = tick.hit_rates
    shown.add_row("events", f"{tick.events:,}", whole)
    shown.add_row("events/s", f"{tick.events_per_second:,.0f}", "handed to Kafka")
    shown.add_row("users adapted/s", f"{tick.adapted_per_second:,.0f}", "lists read back from Kafka")
    shown.add_row("lag, offsets", f"{tick.lag_offsets:,}", "ingest and adapt together, as last committed")
    shown.add_row("lag, seconds", f"{tick.lag_seconds:.1f}", "age of the oldest record not committed")
    shown.add_row("event to score, p50", f"{tick.p50_ms:.0f} ms", "")
    shown.add_row("event to score, p99", f"{tick.p99_ms:.0f} ms", "")
    shown.add_row("hit rate, adapted", f"{rates['adapted']:.1%}", "the click was on the user's newest list")
    shown.add_row("hit rate, unadapted", f"{rates['unadapted']:.1%}", "... on the list that fits everybody")
    shown.add_row("hit rate, placebo", f"{rates['placebo']:.1%}", "... on another user's newest list")
    shown.add_row("clicks judged", f"{tick.clicks:,}", "each before its own event was sent")
    return shown


def tick_line(tick: Tick) -> str:
    """The same in one line."""
    rates = " ".join(f"{arm} {rate:.1%}" for arm, rate in tick.hit_rates.items())
    return (
        f"{tick.seconds:4.0f} s  {tick.events:,} events ({tick.events_per_second:,.0f}/s)  "
        f"{tick.adapted_per_second:,.0f} adapted/s  lag {tick.lag_offsets:,} ({tick.lag_seconds:.1f} s)  "
        f"p50 {tick.p50_ms:.0f} ms p99 {tick.p99_ms:.0f} ms  hits: {rates}"
    )
