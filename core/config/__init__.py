"""The configuration: one YAML for service and learner, strict, checked before anything heavy is imported.

keys        section (what every section is); schema (the top level), with training, output, lora, sharding and
            trackers as its parts; trl with objective; sections (the others); refusals (keys that rlx refuses)
reading     source (YAML with its lines), load (to a Config, or all that is wrong with it)
what of it  plan (the arithmetic of a run), shown (what others may see), reference (writes docs/configuration.md)
"""

from rlx.config.load import load_config, parse_overrides
from rlx.config.plan import Plan, make_plan
from rlx.config.schema import Config

__all__ = ["Config", "Plan", "load_config", "make_plan", "parse_overrides"]
