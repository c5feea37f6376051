"""Judging what was learned: a synthetic shop, past events from files, hits counted as they come."""
