"""Postgres: the tables, the partition ledger, the support sets, items, ads and releases."""
