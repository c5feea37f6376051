"""A real Kafka and a real PostgreSQL without a container, for the demo, the tests and `innerloop up`."""
