"""The keys of adapters, flat at the top level as Axolotl has them, and the laws between them."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from rlx.config.section import Section

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM can make room for."""
_OFF: tuple[Any, ...] = (None, False, [], {}, "")
_QUANTISATION: dict[str, tuple[Any, ...]] = {
    "bnb_4bit_quant_type": ("nf4", "fp4"),
    "bnb_4bit_use_double_quant": (True, False),
}


def engine_rank(rank: int) -> int:
    """The room that engines need for adapters of this rank, at most the greatest of LORA_RANKS."""
    return next(room for room in LORA_RANKS if room >= rank)


class LoraKeys(Section):
    """Training of an adapter instead of the whole model."""

    adapter: Literal["lora", "qlora"] | None = Field(
        None,
        description="`lora`: train low-rank updates of the chosen layers with PEFT. `qlora`: over a base model in 4 bits. Default: the whole model.",
    )
    load_in_4bit: bool | None = Field(None, description="As `adapter: qlora` says already.")
    bnb_config_kwargs: dict[str, str | bool] = Field(
        default={},
        description="How the base model of `adapter: qlora` is quantised: bnb_4bit_quant_type (nf4, or fp4) and bnb_4bit_use_double_quant (true).",
    )
    lora_r: int = Field(8, ge=1, description="Rank of the updates.")
    lora_alpha: int = Field(8, ge=1, description="The updates are scaled by lora_alpha / lora_r.")
    lora_dropout: float = Field(
        0.0, ge=0, lt=1, description="Dropout in front of the updates; only where trl.disable_dropout is false."
    )
    lora_target_modules: list[str] | str | None = Field(
        None, description="Layers to update, by the ends of their names, or one regular expression for whole names."
    )
    lora_target_linear: bool = Field(
        False, description="Update every linear layer but the language-model head, besides lora_target_modules."
    )
    lora_modules_to_save: list[str] = Field(
        default=[], description="Layers that are trained whole, and saved with the adapter."
    )
    lora_model_dir: str | None = Field(
        None, description="Folder of an adapter to go on from; what it says of itself replaces the keys above."
    )
    peft_use_dora: bool = Field(False, description="DoRA: the lengths of the weights' columns are trained apart.")
    peft_use_rslora: bool = Field(False, description="Scale by lora_alpha / √lora_r instead.")
    lora_sync: Literal["adapter", "merged"] = Field(
        "merged",
        description="How the workers get the policy. `merged`: as a whole model with the adapter merged in, of which only the changed elements travel. `adapter`: the adapter alone, beside the base model that the workers have loaded themselves; not for DoRA and lora_modules_to_save.",
    )
    rl_adapter_ref_model: bool = Field(
        False,
        description="Take a second model as reference where trl.beta > 0: the base model with the adapter of lora_model_dir. Default: the model without its adapter, which costs no memory.",
    )

    @field_validator("adapter", "lora_model_dir", mode="before")
    @classmethod
    def off_is_none(cls, value: Any) -> Any:
        return None if value in _OFF else value

    @field_validator("lora_target_modules", mode="before")
    @classmethod
    def no_modules_are_none(cls, value: Any) -> Any:
        return value or None

    @field_validator("lora_target_modules")
    @classmethod
    def one_expression_compiles(cls, value: list[str] | str | None) -> list[str] | str | None:
        try:
            re.compile(value if isinstance(value, str) else "")
        except re.error as error:
            raise ValueError(f"{value!r} is no regular expression: {error}; write a list for ends of names") from error
        return value

    @model_validator(mode="after")
    def adapter_keys_are_for_adapters(self) -> LoraKeys:
        given = [name for name in LoraKeys.model_fields if name in self.model_fields_set]
        extra = [name for name in given if name != "adapter" and getattr(self, name) not in _OFF]
        if self.adapter is None and extra:
            kind = "qlora" if extra[0] in ("load_in_4bit", "bnb_config_kwargs") else "lora"
            raise ValueError(
                f"{extra[0]} needs `adapter: {kind}`; add that, or remove the key to train the whole model"
            )
        return self

    @model_validator(mode="after")
    def four_bits_are_of_qlora(self) -> LoraKeys:
        if self.adapter == "qlora" and self.load_in_4bit is False:
            raise ValueError("adapter: qlora excludes load_in_4bit: false; remove it, or write `adapter: lora`")
        if self.adapter != "qlora" and (self.load_in_4bit or self.bnb_config_kwargs):
            name = "load_in_4bit" if self.load_in_4bit else "bnb_config_kwargs"
            raise ValueError(f"{name} needs `adapter: qlora`; write that, or remove the key")
        for name, value in self.bnb_config_kwargs.items():
            if value not in _QUANTISATION.get(name, ()):
                raise ValueError(
                    f"bnb_config_kwargs: {name}: {value} cannot be used; it may hold bnb_4bit_quant_type (nf4 or fp4) and "
                    "bnb_4bit_use_double_quant (true or false)"
                )
        return self

    @model_validator(mode="after")
    def an_adapter_says_which_layers(self) -> LoraKeys:
        said = self.lora_target_linear or self.lora_target_modules or self.lora_model_dir
        if self.adapter is not None and not said:
            raise ValueError(
                f"adapter: {self.adapter} does not say which layers to update; write `lora_target_linear: true`, or their names in "
                "lora_target_modules"
            )
        if self.lora_target_linear and isinstance(self.lora_target_modules, str):
            raise ValueError(
                "lora_target_linear excludes a regular expression in lora_target_modules; keep one, or write a list"
            )
        return self

    @model_validator(mode="after")
    def an_adapter_can_be_sent_alone(self) -> LoraKeys:
        if self.lora_sync != "adapter":
            return self
        targets = self.lora_target_modules if isinstance(self.lora_target_modules, list) else []
        ends = [name for name in targets if name.rpartition(".")[2] in ("embed_tokens", "lm_head")]
        if self.adapter == "qlora":
            problem = "adapter: qlora: the workers would hold the base model as it was before it was quantised"
        elif self.peft_use_dora:
            problem = "peft_use_dora: vLLM loads no DoRA"
        elif self.lora_modules_to_save:
            problem = "lora_modules_to_save: vLLM loads low-rank updates only"
        elif ends:
            problem = f"lora_target_modules: {ends[0]}: only linear layers between embedding and head are sent so"
        elif self.lora_r > LORA_RANKS[-1]:
            problem = f"lora_r: {self.lora_r}: vLLM takes ranks up to {LORA_RANKS[-1]}"
        elif self.lora_model_dir and "lora_r" not in self.model_fields_set:
            raise ValueError(
                "lora_sync: adapter with lora_model_dir needs lora_r, for which the workers make room; write the `r` of "
                "its adapter_config.json"
            )
        else:
            return self
        raise ValueError(f"lora_sync: adapter excludes {problem}; write `lora_sync: merged`, or remove the other key")
