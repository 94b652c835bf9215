"""What every section of the YAML is: frozen, and strict about its keys."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict
from pydantic.fields import FieldInfo


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def keys_of(section: type[BaseModel]) -> dict[str, FieldInfo]:
    """The fields by the keys that the YAML has for them; `async` is no name in Python."""
    return {field.alias or name: field for name, field in section.model_fields.items()}
