"""What an operator is told of a database that cannot be used."""

import psycopg2
from sqlalchemy import create_engine

from innerloop.store.database import refusal


def test_of_a_database_that_does_not_exist_it_says_create_and_not_start() -> None:
    why = 'connection to server at "h", port 5 failed: FATAL:  database "nosuch" does not exist'
    said = str(refusal(create_engine("postgresql+psycopg2://u:hush@h:5/nosuch"), psycopg2.OperationalError(why)))
    assert said.startswith("The database at h:5/nosuch refuses (")
    assert said.endswith(": create it, or correct INNERLOOP_DATABASE__URL.")
    assert "hush" not in said
