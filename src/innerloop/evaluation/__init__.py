"""Judging what was learned: a synthetic shop, past events from files, hits counted as they come.

A folder for each protocol of `innerloop evaluate`, named as its command. Its protocol.py reads the data, asks every arm
at every moment, and returns an `Outcome`; the other files are its data, its arms and its baselines.

    conversion/   cold_start/   sequence/   slate/   stream/
    baselines/    those that stream and slate share
    judge/        whether a run of the service lost, doubled or misplaced anything
    quality/      how lists fare with users just now, for `innerloop quality`

Beside the folders lie the synthetic shop and what they share.
"""
