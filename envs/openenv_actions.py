"""Whether an action fits the JSON schema that a server gives for its actions, told in words that a policy can use.

Only what policies get wrong: names of fields, those that are missing, their types. Ranges and patterns are left to
the server, which answers VALIDATION_ERROR.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rlx.envs.errors import ActionError

Schema = Mapping[str, Any]

_INHERITED = "metadata"
"""A field that every OpenEnv action has, and policies have no use for."""
_NAMES = {"integer": "an integer", "number": "a number", "boolean": "true or false", "string": "a text", "null": "null",
          "array": "a list", "object": "an object"}  # fmt: skip
_BOOLEANS = {"true": True, "false": False}


def fit(action: Mapping[str, Any], schema: Schema) -> dict[str, Any]:
    """`action` with texts such as "3" made the numbers that they stand for. ActionError naming every fault."""
    faults: list[str] = []
    fitted = _object(action, schema, schema.get("$defs", {}), "", faults)
    if faults:
        raise ActionError(f"the action does not fit: {'; '.join(faults)}. Its fields: {describe(schema)}")
    return fitted


def required(schema: Schema) -> list[str]:
    """The names of the fields that an action must have."""
    return list(schema.get("required", ()))


def shown(schema: Schema) -> dict[str, Any]:
    """The schema as a policy is shown it."""
    properties = {name: field for name, field in schema.get("properties", {}).items() if name != _INHERITED}
    return {"type": "object", **schema, "properties": properties}


def describe(schema: Schema) -> str:
    """The fields of an action in one line."""
    fields = shown(schema)["properties"]
    defs = schema.get("$defs", {})
    told = [
        f"{name} ({_kind(field, defs)}{'' if name in required(schema) else ', optional'})"
        for name, field in fields.items()
    ]
    return ", ".join(told) or "none"


def _object(value: Mapping[str, Any], schema: Schema, defs: Schema, path: str, faults: list[str]) -> dict[str, Any]:
    properties = schema.get("properties", {})
    extra = schema.get("additionalProperties", True)
    fitted: dict[str, Any] = {}
    for name, item in value.items():
        if name in properties:
            fitted[name] = _value(item, properties[name], defs, f"{path}{name}", faults)
        elif extra is False:
            faults.append(f"{path}{name} is no field of it")
        else:
            fitted[name] = item
    faults += [f"{path}{name} is missing" for name in required(schema) if name not in value]
    return fitted


def _value(value: Any, schema: Schema, defs: Schema, path: str, faults: list[str]) -> Any:
    options = [_resolved(option, defs) for option in _options(schema, defs)]
    chosen = next((option for option in options if _is(value, option)), None)
    if chosen is None:
        for option in options:
            converted = _converted(value, option)
            if converted is not None:
                return converted
        faults.append(f"{path} must be {_kind(schema, defs)}, not {value!r:.80}")
        return value
    if isinstance(value, dict) and "properties" in chosen:
        return _object(value, chosen, defs, f"{path}.", faults)
    if isinstance(value, list) and "items" in chosen:
        return [_value(item, chosen["items"], defs, f"{path}[{i}]", faults) for i, item in enumerate(value)]
    return value


def _resolved(schema: Schema, defs: Schema) -> Schema:
    return defs.get(str(schema["$ref"]).rpartition("/")[2], {}) if "$ref" in schema else schema


def _options(schema: Schema, defs: Schema) -> Iterator[Schema]:
    schema = _resolved(schema, defs)
    alternatives = schema.get("anyOf") or schema.get("oneOf")
    if alternatives:
        for alternative in alternatives:
            yield from _options(alternative, defs)
    elif isinstance(schema.get("type"), list):
        yield from ({**schema, "type": kind} for kind in schema["type"])
    else:
        yield schema


def _is(value: Any, schema: Schema) -> bool:
    allowed = [schema["const"]] if "const" in schema else schema.get("enum")
    if allowed is not None and value not in allowed:
        return False
    number = isinstance(value, int | float) and not isinstance(value, bool)
    match schema.get("type"):
        case "integer":
            return number and float(value).is_integer()
        case "number":
            return number
        case "boolean":
            return isinstance(value, bool)
        case "string":
            return isinstance(value, str)
        case "null":
            return value is None
        case "array":
            return isinstance(value, list)
        case "object":
            return isinstance(value, dict)
    return True


def _converted(value: Any, schema: Schema) -> Any:
    """The number or truth value that the text `value` stands for; None when it stands for none that fits."""
    if not isinstance(value, str):
        return None
    text = value.strip()
    converted: Any = None
    try:
        match schema.get("type"):
            case "integer":
                converted = int(text)
            case "number":
                converted = float(text)
            case "boolean":
                converted = _BOOLEANS.get(text.lower())
    except ValueError:
        return None
    return converted if converted is not None and _is(converted, schema) else None


def _kind(schema: Schema, defs: Schema) -> str:
    told = []
    for option in _options(schema, defs):
        allowed = [option["const"]] if "const" in option else option.get("enum")
        told.append(
            " or ".join(repr(value) for value in allowed)
            if allowed
            else _NAMES.get(str(option.get("type")), "any value")
        )
    return " or ".join(dict.fromkeys(told))
