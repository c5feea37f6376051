"""Innerloop: click and purchase events in, adapted recommendation and ad scores out.

The way of the data, and where each step is:

    events.py            one event record, decoded and checked
    ingest.py            a batch of them becomes support sets and adaptation requests
    support.py           the support set: capacity, order, deduplication
    impressions.py       what was shown: kept apart, for the ads' click head
    erasure.py           a user's past is deleted, and kept out
    trends.py            what everybody does just now: live popularity, co-visits
    activity.py          ingest tells adapt of it, through Postgres
    adapt.py             requests become score records
    scores.py            the messages out
    holdout.py           who gets the unadapted list, for comparison
    shop_items.py        what the shop calls its items, for people who look
    client.py            reading them, for downstream services

    streams/             Kafka        store/         Postgres
    learning/            torch        evaluation/    judging
"""
