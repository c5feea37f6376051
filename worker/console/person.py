"""The console's look-up of one user: what is stored, what is published, and what the last change did."""

from collections.abc import Callable
from functools import partial

import structlog
from nicegui import run, ui

from innerloop.errors import InnerloopError

from .lookup import Person, as_time
from .parts import Table, heading

_LOG = structlog.get_logger(__name__)
_NAMED = 5


class PersonCard:
    """Laid out where it is made; `find` is called in a thread."""

    def __init__(self, find: Callable[[str], Person]) -> None:
        self._find, self._example, self._asked = find, "", 0
        with ui.card().props("flat bordered").classes("w-full"):
            heading("A user", level=3)
            with ui.row().classes("items-center gap-2"):
                self._user = ui.input("user id").props("stack-label outlined dense")
                self._user.on("keydown.enter", self._find_user)
                ui.button("Look up", on_click=self._find_user)
            self._person = ui.column().classes("w-full")

    def suggest(self, user: str | None) -> None:
        """Name somebody who could be looked up."""
        if user and not self._example:
            self._example = user
            self._user.props["placeholder"] = f"for instance {user}"
            self._user.update()

    async def _find_user(self) -> None:
        user = (self._user.value or "").strip()
        self._asked += 1
        asked = self._asked
        self._person.clear()
        if not user:
            return
        with self._person:
            ui.spinner()
        show = await self._answer(user)
        if asked == self._asked:  # else somebody was asked for meanwhile
            self._person.clear()
            with self._person:
                show()

    async def _answer(self, user: str) -> Callable[[], None]:
        """What shows the user, or why the user cannot be shown."""
        try:
            person = await run.io_bound(self._find, user)
        except InnerloopError as error:
            return partial(_say, str(error))
        except Exception as error:  # noqa: BLE001 - whatever it was, the viewer is told
            _LOG.exception("not looked up")
            return partial(_say, f"The user cannot be looked up ({type(error).__name__}): the console's log says more.")
        return partial(_show_person, person)


def _say(sentence: str) -> None:
    ui.label(sentence).classes("text-negative").props("role=alert")


def _show_person(person: Person | None) -> None:
    if person is None:  # the server stops
        return
    if person.support_version is None and person.recommendations is None:
        ui.label(f"Nothing is stored or published of user {person.user_id}.")
        return
    with ui.element("div").classes("whitespace-pre-line leading-relaxed").props("data-test=chain"):
        with ui.row().classes("items-center gap-2"):
            ui.badge("fresh" if person.fresh else "behind", color="positive" if person.fresh else "warning")
            ui.label(_verdict(person)).classes("font-bold")
        ui.label(_chain(person))
        ui.label(_change(person)).props("data-test=change")
        ui.label(person.notice).classes("text-sm opacity-80").props("data-test=names")
    with ui.grid().classes("w-full grid-cols-1 lg:grid-cols-2 gap-4 items-start"):
        listed = Table(
            "Recommendations", "rank", "item", "change", "score", "category", numbers=["rank", "score"], test="listed"
        )
        listed.show(
            [
                {
                    "key": item.item_id,
                    "rank": place,
                    "item": item.item_id,
                    "name": person.names.get(item.item_id),
                    "category": person.categories.get(item.item_id, ""),
                    "score": f"{item.score:.4f}",
                    "change": _moved(person, item.item_id),
                }
                for place, item in enumerate(person.recommendations.items if person.recommendations else [], 1)
            ]
        )
        with ui.column().classes("w-full gap-4"):
            support = Table("Support set, newest first", "time", "event", "item", "category", test="support")
            support.show(
                [
                    {"key": place, **each.__dict__, "name": person.names.get(each.item)}
                    for place, each in enumerate(person.support)
                ]
            )
            _show_ads(person)


def _show_ads(person: Person) -> None:
    listed = person.ads
    if listed is None:
        return
    kind, columns = listed.kind.replace("_", " "), listed.columns
    ads = Table(f"Ads, {kind}", "rank", "ad", "item", *columns, numbers=["rank", *columns], test="ads")
    ads.show(
        [
            {
                "key": ad.ad_id,
                "rank": place,
                "ad": ad.ad_id,
                "item": ad.item_id,
                "name": person.names.get(ad.item_id),
                **dict(zip(columns, listed.written(ad), strict=True)),
            }
            for place, ad in enumerate(listed.ads, 1)
        ]
    )


def _verdict(person: Person) -> str:
    if person.recommendations is None:
        return "There is no list yet."
    if person.fresh:
        return "The list was made of exactly what is stored, by the release in force."
    return f"The list names an older state; the release in force is {person.model_version}."


def _chain(person: Person) -> str:
    """The versions that prove, or disprove, that the list is made of what is stored."""
    shown = person.recommendations
    stored = f"Postgres: support set version {person.support_version}, {len(person.support)} events."
    if shown is None:
        return stored
    arm = "adapted" if shown.arm == "adapted" else "hold-out, which gets the unadapted list"
    return (
        f"{stored}\nKafka: list of support version {shown.support_version}, model {shown.model_version}, by"
        f" {shown.method} ({arm}), scored {as_time(shown.scored_at)}, newest event {as_time(shown.event_time)}."
    )


def _change(person: Person) -> str:
    """What the last event did to the list."""
    if person.before is None or person.recommendations is None or not person.support:
        return ""
    last, moved = person.support[0], person.moved.values()
    new, up = sum(each is None for each in moved), sum(each is not None and each > 0 for each in moved)
    down, gone = sum(each is not None and each < 0 for each in moved), person.gone
    named = ", ".join(map(person.called, gone[:_NAMED])) + (", ..." if len(gone) > _NAMED else "")
    return (
        f"After the {last.event} on {person.called(last.item)} at {last.time}, against the list of support version"
        f" {person.before.support_version}: {new} new, {up} up, {down} down, {len(gone)} gone"
        f"{f' ({named})' if gone else ''}."
    )


def _moved(person: Person, item: str) -> str:
    if not person.moved:
        return ""
    places = person.moved[item]
    if places is None:
        return "new"
    return f"up {places}" if places > 0 else f"down {-places}" if places < 0 else "same"
