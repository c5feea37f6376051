"""How lists fare with users just now: the figures of `innerloop quality`, without Kafka or a clock."""
