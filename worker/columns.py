"""`--column ours=theirs`, of every command that reads what somebody else has written."""

from collections.abc import Sequence
from typing import Annotated

import typer

from innerloop.errors import SettingsError

Columns = Annotated[
    list[str] | None,
    typer.Option("--column", help="ours=theirs, for columns named differently; may be given again."),
]


def columns_of(pairs: Sequence[str] | None) -> dict[str, str]:
    """By our names the file's. Raises SettingsError for what isn't ours=theirs."""
    mapping = {}
    for pair in pairs or []:
        ours, equals, theirs = pair.partition("=")
        if not (ours and equals and theirs):
            raise SettingsError(f"--column {pair} is not ours=theirs: write for instance --column item_id=sku.")
        mapping[ours] = theirs
    return mapping
