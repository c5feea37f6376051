"""`innerloop scores USER`: what downstream services read about one user."""

from datetime import UTC, datetime

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from innerloop.client import newest
from innerloop.config import Settings
from innerloop.errors import RetryError, ServiceError
from innerloop.scores import AdScores, RecommendationScores


def show_scores(settings: Settings, user_id: str) -> int:
    """Print one user's recommendations and ads, best first, and return the exit code: 1 for a user without either.

    Raises ServiceError when no broker answers, a topic does not exist, or reading takes too long.
    """
    console = Console()
    try:
        found = [newest(settings, "recommendations", user_id), newest(settings, "ads", user_id)]
    except RetryError as error:
        raise ServiceError(str(error)) from None
    for record in found:
        if record is not None:
            console.print(_table(record))
            console.print(_origin(record), markup=False, highlight=False)
    if not any(found):
        console.print(f"User {user_id} has no scores: they come with the user's first event.", markup=False)
        return 1
    return 0


def _table(record: RecommendationScores | AdScores) -> Table:
    table = Table(title=f"{record.model} for {escape(record.user_id)}", title_justify="left")
    table.add_column("rank", justify="right")
    if isinstance(record, AdScores):
        _add_ads(table, record)
    else:
        _add_items(table, record)
    return table


def _origin(record: RecommendationScores | AdScores) -> str:
    return (
        f"Scored {_text(record.scored_at)} by {record.method}, model {record.model_version}, from support set "
        f"{record.support_version} ({record.support_size} events, newest {_text(record.event_time)}).\n"
    )


def _add_items(table: Table, record: RecommendationScores) -> None:
    table.add_column("item")
    table.add_column("score", justify="right")
    for rank, item in enumerate(record.items, 1):
        table.add_row(str(rank), escape(item.item_id), f"{item.score:.4f}")


def _add_ads(table: Table, record: AdScores) -> None:
    table.add_column("ad")
    table.add_column("item")
    for name in record.columns:
        table.add_column(name, justify="right")
    for rank, ad in enumerate(record.ads, 1):
        table.add_row(str(rank), escape(ad.ad_id), escape(ad.item_id), *record.written(ad))


def _text(epoch_ms: int) -> str:
    return f"{datetime.fromtimestamp(epoch_ms / 1000, UTC):%Y-%m-%d %H:%M:%S} UTC"
