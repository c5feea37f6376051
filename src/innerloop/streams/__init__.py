"""Kafka: the consumer loop, the producer, dead letters, topics and lag."""
