"""What people read of an ad's score."""

import pytest

from innerloop.scores import AdScores, ScoredAd


def ads(kind: str) -> AdScores:
    return AdScores(
        user_id="u",
        model="ads",
        model_version=1,
        support_version=1,
        support_size=1,
        event_time=0,
        scored_at=0,
        method="bayes",
        ads=[],
        kind=kind,
    )


ALONE = ScoredAd(ad_id="a", item_id="i", score=0.25)


@pytest.mark.parametrize(
    ("kind", "ad", "told"),
    [
        ("ranking", ALONE, {"score": "0.2500"}),
        ("of a later version", ALONE, {"score": "0.2500"}),
        ("click", ALONE, {"clicked if shown": "25.00%"}),
        ("purchase_given_click", ALONE, {"bought if clicked": "25.00%"}),
        (
            "click_and_purchase",
            ScoredAd(ad_id="a", item_id="i", score=0.02, click=0.4, purchase_given_click=0.05),
            {"clicked if shown": "40.00%", "bought if clicked": "5.00%", "clicked and bought if shown": "2.00%"},
        ),
        (
            "click_and_purchase",
            ALONE,
            {"clicked if shown": "", "bought if clicked": "", "clicked and bought if shown": "25.00%"},
        ),
    ],
)
def test_a_probability_is_told_in_percent_with_what_it_is_the_product_of(
    kind: str, ad: ScoredAd, told: dict[str, str]
) -> None:
    listed = ads(kind)
    assert dict(zip(listed.columns, listed.written(ad), strict=True)) == told
