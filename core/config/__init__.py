"""The configuration: one YAML for service and learner, strict, checked before anything heavy is imported.

`source` reads YAML with line numbers, `sections` and `schema` hold the keys, `refusals` the Axolotl keys that rlx
knows and refuses, `load` puts them together, `plan` does the arithmetic, `reference` writes docs/configuration.md.
"""

from rlx.config.load import load_config, parse_overrides
from rlx.config.plan import Plan, make_plan
from rlx.config.schema import Config

__all__ = ["Config", "Plan", "load_config", "make_plan", "parse_overrides"]
