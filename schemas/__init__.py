"""The wire contract as data: JSON Schemas by message and version, and the topics. README.md explains it."""

import json
from importlib.resources import files
from typing import Any


def load(name: str, version: int = 1) -> dict[str, Any]:
    """The JSON Schema of a message; raises FileNotFoundError when there is no such message or version."""
    schema: dict[str, Any] = json.loads(read(f"{name}.v{version}.json"))
    return schema


def read(file: str) -> str:
    """The text of one file of this package, such as topics.toml."""
    return files(__name__).joinpath(file).read_text(encoding="utf-8")
