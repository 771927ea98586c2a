"""The shapes of requests: every number has a lower and an upper bound, so nothing behind has to think of others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from elastic.gateway import admin
from elastic.gateway.schema import Shape

pytestmark = pytest.mark.unit


def kinds(of: type[Shape]) -> Iterator[type[Shape]]:
    for each in of.__subclasses__():
        yield each
        yield from kinds(each)


def unbounded(schema: Any, path: str = "") -> Iterator[str]:
    if isinstance(schema, list):
        for index, each in enumerate(schema):
            yield from unbounded(each, f"{path}/{index}")
    elif isinstance(schema, dict):
        if schema.get("type") in ("integer", "number"):
            low, high = {"minimum", "exclusiveMinimum"} & set(schema), {"maximum", "exclusiveMaximum"} & set(schema)
            if not (low and high):
                yield path
        for key, each in schema.items():
            yield from unbounded(each, f"{path}/{key}")


@pytest.mark.parametrize("shape", sorted(kinds(Shape), key=lambda each: each.__name__))
def test_every_number_is_bounded(shape: type[Shape]) -> None:
    assert list(unbounded(shape.model_json_schema())) == []


def test_both_apis_are_looked_at() -> None:
    names = {each.__name__ for each in kinds(Shape)}
    assert {admin.ScaleRequest.__name__, "ChatRequest", "CompletionRequest"} <= names
