"""Prompts: from `datasets:` in the YAML through the user's transform to token ids.

Not here: which prompt a step draws (`requests.py`).
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import numpy as np
from huggingface_hub.errors import HfHubHTTPError
from transformers import PreTrainedTokenizerBase

from rlx.config import Config
from rlx.config.sections import DatasetSection
from rlx.dotted import resolve, user_traceback
from rlx.errors import DatasetError, UserCodeError
from rlx.learner.incoming import reasoning_gym

_SUFFIXES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow", ".txt": "text"}

_FACTORY = "`type` names a function that is called once, with the configuration, and returns the function for a row."


@dataclass(frozen=True)
class Prompt:
    """One row: `prompt` as the transform gave it, `ids` int32 [P], and the other columns as JSON values."""

    prompt: str | list[dict[str, Any]]
    ids: np.ndarray
    columns: Mapping[str, Any]


@dataclass(frozen=True)
class PromptSet:
    """The rows to train or evaluate on; `too_long` were left out for exceeding max_prompt_length tokens."""

    prompts: list[Prompt]
    too_long: int


def load_prompts(config: Config, tokenizer: PreTrainedTokenizerBase) -> tuple[PromptSet, PromptSet | None]:
    """Training prompts, and held-out ones when `test_datasets` or `val_set_size` asks for them.

    Raises DatasetError or UserCodeError, with the configuration key.
    """
    rows = _load_all(config, config.datasets, "datasets", tokenizer)
    held_out = _load_all(config, config.test_datasets, "test_datasets", tokenizer) if config.test_datasets else None
    if config.val_set_size:
        size = config.val_set_size if config.val_set_size < 1 else int(config.val_set_size)
        if size >= len(rows):
            raise DatasetError(f"{config.path}: val_set_size ({size}) holds out all {len(rows)} rows. Lower it.")
        parts = rows.train_test_split(test_size=size, seed=config.seed)
        rows, held_out = parts["train"], parts["test"]
    train = _tokenize(config, rows, tokenizer, "datasets")
    return train, None if held_out is None else _tokenize(config, held_out, tokenizer, "test_datasets")


Tokenizer: TypeAlias = PreTrainedTokenizerBase | None


def first_row(config: Config, tokenizer: Tokenizer) -> dict[str, Any]:
    """The first row of the first data set, transformed: a sample for `rlx check`."""
    return first_rows(config, tokenizer, 1)[0]


def first_rows(config: Config, tokenizer: Tokenizer, count: int) -> list[dict[str, Any]]:
    """The first `count` rows of the first data set, or all when there are fewer."""
    rows = _load_one(config, config.datasets[0], "datasets[0]", tokenizer)
    return [dict(rows[index]) for index in range(min(count, len(rows)))]


def prompt_at(config: Config, tokenizer: PreTrainedTokenizerBase, index: int) -> Prompt:
    """Row `index` of the first data set as a prompt: a sample for `rlx rollout test`."""
    rows = _load_one(config, config.datasets[0], "datasets[0]", tokenizer)
    if index >= len(rows):
        raise DatasetError(f"--row {index}: datasets[0] has the rows 0 to {len(rows) - 1}.")
    return _tokenize(config, rows.select([index]), tokenizer, f"datasets[0], row {index}").prompts[0]


def _load_all(config: Config, sections: Sequence[DatasetSection], key: str, tokenizer: Tokenizer) -> datasets.Dataset:
    parts = [_load_one(config, section, f"{key}[{index}]", tokenizer) for index, section in enumerate(sections)]
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


def _load_one(config: Config, section: DatasetSection, key: str, tokenizer: Tokenizer) -> datasets.Dataset:
    rows = _read(config, section, key)
    if len(rows) == 0:
        raise DatasetError(f"{config.path}: {key}: the data set is empty (split {section.split!r}).")
    if section.type is not None:
        rows = _transform(config, section.type, f"{key}.type", rows, tokenizer)
    if "prompt" not in rows.column_names:
        produced = "after the transform " if section.type else ""
        raise DatasetError(
            f"{config.path}: {key}: there is no column 'prompt' {produced}(columns: {', '.join(rows.column_names) or 'none'}). "
            f"{'Let the transform return one' if section.type else 'Name a transform in `type` that makes one'}: a string, "
            "or a list of chat messages."
        )
    return rows


def _read(config: Config, section: DatasetSection, key: str) -> datasets.Dataset:
    if section.path and section.path.startswith(reasoning_gym.PREFIX):
        return reasoning_gym.read_task(config, section, key)
    cache = config.local(config.dataset_prepared_path) if config.dataset_prepared_path else None
    local = config.local(section.path) if section.path else None
    files = _files(config, section, key, local)
    try:
        if files:
            kind = section.ds_type or _SUFFIXES.get(Path(files[0]).suffix)
            if kind is None:
                raise DatasetError(
                    f"{config.path}: {key}: the format of {files[0]} is not known by its suffix. Write ds_type."
                )
            loaded = datasets.load_dataset(kind, data_files=files, split=section.split, cache_dir=cache)
        else:
            loaded = datasets.load_dataset(
                local, section.name, split=section.split, revision=section.revision, cache_dir=cache
            )
    except (ConnectionError, HfHubHTTPError) as error:
        raise DatasetError(
            f"{config.path}: {key}.path: the hub cannot be reached for {section.path!r} ({type(error).__name__}). If you "
            "have the data, name the local file or folder; behind a firewall, set HF_HUB_OFFLINE=1 and use a filled cache."
        ) from error
    except (FileNotFoundError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        first = str(error.__cause__ or error).strip().splitlines()
        raise DatasetError(
            f"{config.path}: {key}: cannot be loaded: {first[0] if first else type(error).__name__}"
        ) from error
    if not isinstance(loaded, datasets.Dataset):
        raise DatasetError(f"{config.path}: {key}.split: {section.split!r} does not name one split.")
    return loaded


def _files(config: Config, section: DatasetSection, key: str, local: str | None) -> list[str]:
    """Local files that this entry names, absolute; empty when it names a hub data set or a folder."""
    names = [section.data_files] if isinstance(section.data_files, str) else list(section.data_files or [])
    if local is not None and Path(local).suffix in _SUFFIXES and not names:
        names = [local]
    found = []
    for name in names:
        path = Path(config.local(name))
        if not path.is_file():
            raise DatasetError(
                f"{config.path}: {key}: there is no file {name!r} next to the YAML ({config.base_dir}) or in the current folder."
            )
        if path.stat().st_size == 0:
            raise DatasetError(f"{config.path}: {key}: the file {path} is empty.")
        found.append(str(path))
    if not found and local is not None and local.startswith((".", "/", "~")) and not Path(local).exists():
        raise DatasetError(f"{config.path}: {key}.path: there is no file or folder {local!r}.")
    return found


def _transform(config: Config, name: str, key: str, rows: datasets.Dataset, tokenizer: Tokenizer) -> datasets.Dataset:
    factory = resolve(name, base_dir=config.base_dir, key=key)
    try:
        made = call_user(f"{key} ({name})", factory, config)
    except UserCodeError as error:
        raise UserCodeError(f"{error}\n{_FACTORY}") from error.__cause__
    function, options = made if isinstance(made, tuple) else (made, {})
    if not callable(function):
        raise UserCodeError(
            f"{key} ({name}) returned a {type(made).__name__}. A transform returns `transform_fn`, or "
            "`transform_fn, {'remove_columns': [...]}`."
        )
    options = dict(options)
    remove = options.pop("remove_columns", None)
    if remove == "__all__":
        remove = rows.column_names
    elif remove is not None:
        remove = [column for column in remove if column in rows.column_names]

    wanted = {"tokenizer", "processing_class"} & set(inspect.signature(function).parameters)
    keywords = dict.fromkeys(wanted, tokenizer)

    def one(example: dict[str, Any]) -> dict[str, Any]:
        try:
            made = call_user(f"{key} ({name})", function, example, **keywords)
        except UserCodeError as error:
            if not isinstance(error.__cause__, KeyError):
                raise
            raise UserCodeError(f"{error}\nThe columns of the row are {', '.join(example)}.") from error.__cause__
        if not isinstance(made, Mapping):
            raise UserCodeError(
                f"{key} ({name}) gave a {type(made).__name__} for a row; a dict with 'prompt' is expected."
            )
        return dict(made)

    # Always run again, never from a cache of an older version of the user's code.
    return rows.map(one, remove_columns=remove, load_from_cache_file=False, keep_in_memory=True, **options)


def call_user(label: str, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    """Call user code; whatever it raises becomes a UserCodeError with the user's own traceback."""
    try:
        return function(*arguments, **keywords)
    except Exception as error:  # boundary to user code: anything may come out of it
        raise UserCodeError(
            f"{label} raised {type(error).__name__}: {error}\n{user_traceback(error, hide=[__file__])}"
        ) from error


def _tokenize(config: Config, rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, key: str) -> PromptSet:
    prompts, too_long = [], 0
    for index, row in enumerate(rows):
        prompt = row.pop("prompt")
        ids = encode_prompt(config, tokenizer, prompt, f"{config.path}: {key}, row {index}")
        if len(ids) > config.max_prompt_length:
            too_long += 1
            continue
        prompts.append(Prompt(prompt, np.asarray(ids, dtype=np.int32), _json_columns(config, row, key, index)))
    if not prompts:
        raise DatasetError(
            f"{config.path}: {key}: all {too_long} prompts are longer than max_prompt_length ({config.max_prompt_length} tokens). "
            "Raise trl.max_prompt_length or sequence_len."
        )
    return PromptSet(prompts, too_long)


def encode_prompt(config: Config, tokenizer: PreTrainedTokenizerBase, prompt: Any, where: str) -> list[int]:
    """Token ids of a string, or of chat messages through the chat template with the assistant's turn opened."""
    if isinstance(prompt, str) and prompt:
        return list(tokenizer(prompt)["input_ids"])
    if isinstance(prompt, list) and prompt and all(isinstance(m, Mapping) and "role" in m for m in prompt):
        if tokenizer.chat_template is None:
            raise DatasetError(
                f"{where}: the prompt is chat messages, but the tokenizer has no chat template. Write chat_template_jinja, "
                "or let the transform return a string."
            )
        encoded = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, tokenize=True, return_dict=True, **config.trl.chat_template_kwargs
        )
        return list(encoded["input_ids"])
    raise DatasetError(
        f"{where}: the prompt is {prompt!r:.80}; a non-empty string or a list of chat messages, "
        '[{"role": "user", "content": ...}], is expected.'
    )


def _json_columns(config: Config, row: dict[str, Any], key: str, index: int) -> dict[str, Any]:
    try:
        json.dumps(row)
    except (TypeError, ValueError) as error:
        raise DatasetError(
            f"{config.path}: {key}, row {index}: its columns go to the rewards as JSON, and one is not JSON ({error}). "
            "Let the transform drop it (`remove_columns`) or turn it into text or numbers."
        ) from error
    return row
