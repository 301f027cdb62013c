"""JSON schemas as forms: objects without properties that nobody named.

A schema that says nothing of further properties allows any, and a small model that may go on does
not stop. What has the named ones only is as valid, so forms close such objects, as other servers
do. Where keywords work on the same object from several places, nothing is changed.
"""

from __future__ import annotations

from typing import Any

_HERE = frozenset({"properties", "required", "additionalProperties", "patternProperties"})
_ELSEWHERE = frozenset({"anyOf", "$ref"})
_TOGETHER = frozenset(
    "allOf oneOf not if then else dependentSchemas dependentRequired dependencies propertyNames "
    "minProperties $dynamicRef $recursiveRef unevaluatedProperties".split()
)


def closed(schema: Any) -> Any:
    """Return a schema whose objects have no properties but those that it names."""
    return schema if _intertwined(schema) else _close(schema)


def _intertwined(schema: Any) -> bool:
    """Whether several keywords, at any depth, say what properties one object has."""
    left = [schema]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            keys = value.keys()
            if keys & _TOGETHER or (keys & _ELSEWHERE and keys & _HERE):
                return True
            left += value.values()
        elif isinstance(value, list):
            left += value
    return False


def _close(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_close(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made: dict[str, Any] = {}
    for key, value in schema.items():
        if key in ("properties", "$defs", "definitions") and isinstance(value, dict):
            made[key] = {name: _close(one) for name, one in value.items()}
        elif key in ("items", "prefixItems", "anyOf", "additionalProperties"):
            made[key] = _close(value)
        else:
            made[key] = value
    named, required = schema.get("properties"), schema.get("required", [])
    if (
        isinstance(named, dict)
        and isinstance(required, list)
        and not {"additionalProperties", "patternProperties"} & schema.keys()
        and all(isinstance(name, str) and name in named for name in required)
    ):
        made["additionalProperties"] = False
    return made
