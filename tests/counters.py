"""What this process has counted, for tests that run the loop in threads of their own."""

from prometheus_client import REGISTRY


def counted() -> dict[str, float]:
    """Every counter and histogram now, by name and labels."""
    return {
        " ".join([sample.name, *(f"{name}={value}" for name, value in sample.labels.items())]): sample.value
        for family in REGISTRY.collect()
        for sample in family.samples
        if family.type in {"counter", "histogram"}
    }


def counted_since(before: dict[str, float]) -> dict[str, float]:
    """What was added to each since `counted` gave `before`."""
    return {name: value - before.get(name, 0.0) for name, value in counted().items()}
