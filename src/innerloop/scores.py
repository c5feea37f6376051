"""Messages out: what is asked of adapt, and the score records that downstream services read."""

from typing import Annotated, Literal

import msgspec

Identifier = Annotated[str, msgspec.Meta(min_length=1)]
Model = Literal["recommendations", "ads"]
AdsKind = Literal["purchase_given_click", "ranking"]


class AdaptationRequest(msgspec.Struct, frozen=True, gc=False):
    """Recompute this user. Names a version of the support set and carries no data, so it is idempotent.

    `event_time` (epoch ms) is the newest event in that version; `ingested_at` (epoch ms) is when ingest polled the
    oldest event that the request answers, for lag in seconds.
    """

    user_id: Identifier
    support_version: int
    event_time: int
    ingested_at: int


class ScoredItem(msgspec.Struct, frozen=True, gc=False):
    item_id: Identifier
    score: float


class ScoredAd(msgspec.Struct, frozen=True, gc=False):
    ad_id: Identifier
    item_id: Identifier
    score: float


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
    the user's newest event, is followed by a purchase of its item within 24 hours. Else it only ranks. It is never the
    probability of a click: without impressions that can't be known.
    """

    ads: list[ScoredAd]
    kind: AdsKind = "ranking"
