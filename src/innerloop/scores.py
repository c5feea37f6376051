"""Messages out: what is asked of adapt, and the score records that downstream services read."""

from typing import Annotated, Literal

import msgspec

Identifier = Annotated[str, msgspec.Meta(min_length=1)]
Model = Literal["recommendations", "ads"]
Arm = Literal["adapted", "hold_out"]
AdsKind = Literal["click", "click_and_purchase", "purchase_given_click", "ranking"]
_CHANCES: dict[str, tuple[str, ...]] = {
    "click": ("clicked if shown",),
    "purchase_given_click": ("bought if clicked",),
    "click_and_purchase": ("clicked if shown", "bought if clicked", "clicked and bought if shown"),
}
"""By kind, of what an ad's score is the probability, after those that it is the product of."""


class AdaptationRequest(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """Recompute this user. Names a version of the support set and carries no data, so it is idempotent.

    `event_time` (epoch ms) is the newest event in that version; `ingested_at` (epoch ms) is when ingest polled the
    oldest event that the request answers, for lag in seconds; `appended_at` (epoch ms) is when the oldest record of
    that poll was put on its topic, 0 if unknown: from there runs the latency from event to score.
    """

    user_id: Identifier
    support_version: int
    event_time: int
    ingested_at: int
    appended_at: int = 0
    erased: bool = False
    """The user's support set was erased: tombstones first, also when there is a new set."""


class ScoredItem(msgspec.Struct, frozen=True, gc=False):
    item_id: Identifier
    score: float


class ScoredAd(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """`click` times `purchase_given_click` is the score; they are there with the kind `click_and_purchase` only."""

    ad_id: Identifier
    item_id: Identifier
    score: float
    click: float | None = None
    purchase_given_click: float | None = None


class ScoreHeader(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """What a list of scores was computed from. Times are epoch milliseconds."""

    user_id: Identifier
    model: Model
    model_version: int
    support_version: int
    support_size: int
    trends_version: int = 0
    event_time: int
    scored_at: int
    method: str
    arm: Arm = "adapted"
    """`hold_out`: this user gets the unadapted list (method `none`), so that what adaptation is worth can be told."""

    @property
    def order(self) -> tuple[int, int]:
        """Of two records of one user the one with the higher order holds, whichever came last."""
        return self.model_version, self.support_version


class RecommendationScores(ScoreHeader, frozen=True, gc=False, kw_only=True):
    """One user's best items over the whole catalogue, best first."""

    items: list[ScoredItem]


class AdScores(ScoreHeader, frozen=True, gc=False, kw_only=True):
    """One user's active ads, best first.

    With the kind `purchase_given_click` a score is the calibrated probability that a click on the ad, made right after
    the user's newest event, is followed by a purchase of its item within the attribution window. With
    `click_and_purchase` it is the probability that the ad, shown then, is clicked within an hour and its item then
    bought, and with `click` that it is clicked. Else it only ranks. Without impressions the probability of a click
    can't be known.
    """

    ads: list[ScoredAd]
    kind: AdsKind | str = "ranking"
    """One that isn't known here is a later version's: a ranking."""

    @property
    def columns(self) -> tuple[str, ...]:
        """What `written` writes of each ad, the score last, in words."""
        return _CHANCES.get(self.kind, ("score",))

    def written(self, ad: ScoredAd) -> tuple[str, ...]:
        """An ad's score for people to read: probabilities in percent, a number where it only ranks."""
        if self.kind not in _CHANCES:
            return (f"{ad.score:.4f}",)
        factors = (ad.click, ad.purchase_given_click) if len(self.columns) > 1 else ()
        return tuple("" if chance is None else f"{chance:.2%}" for chance in (*factors, ad.score))
