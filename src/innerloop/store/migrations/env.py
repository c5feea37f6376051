"""Alembic's entry: runs on the connection that `innerloop.store.migrate` passes."""

from alembic import context

from innerloop.store.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
with context.begin_transaction():
    context.run_migrations()
