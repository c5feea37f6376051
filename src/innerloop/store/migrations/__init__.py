"""Alembic migrations, run by `innerloop.store.migrate`."""
