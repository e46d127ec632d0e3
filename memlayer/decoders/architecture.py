"""A decoder's architecture from any config of transformers, and a decoder of it with random weights.

A config is named (a folder, a name on the hub) or written out, and settings change it by their own names. What the
tokenizer decides follows from the tokenizer. transformers keeps whatever name it is given, so one that the config class
does not know is refused here: a misspelt width would train another model.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from memlayer.machine import attention

# Names that a config class takes though they are no fields of it: transformers makes rope_parameters of them, unless
# these are there already, as they are in a config.json.
OLDER_NAMES = {"rope_theta", "rope_scaling"}


def architecture(
    name: str | None, settings: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, length: int
) -> PreTrainedConfig:
    """The config of a decoder for the tokenizer.

    Args:
        name: folder, or name on the hub, whose config is taken; None builds one of ``settings["model_type"]``.
        settings: of the config, by its own names; ``vocab_size`` is the tokenizer's unless it is here.
        length: of the longest sequence.

    Raises:
        ValueError: there is no such config, a setting that it does not know, too few rows or positions.
    """
    settings = dict(settings)
    try:
        config = _named(name, settings) if name else _written(settings)
    except ValueError:
        raise
    except Exception as error:  # whatever a config class raises of a value that does not fit
        raise ValueError(f"model.settings do not fit: {' '.join(str(error).split())}") from error
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, key, getattr(tokenizer, key))
    config.vocab_size = settings.get("vocab_size", len(tokenizer))
    if config.vocab_size < len(tokenizer):
        raise ValueError(f"model.settings.vocab_size is {config.vocab_size}, the tokenizer has {len(tokenizer)} tokens")
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and positions < length:
        raise ValueError(f"text.length is {length}, the model has {positions} positions")
    return config


def _named(name: str, settings: dict[str, Any]) -> PreTrainedConfig:
    if "model_type" in settings:
        raise ValueError(f"model.config is {name} and model.settings has model_type: one decides the family")
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"model.config is {name}: {str(error).splitlines()[0]}") from error
    if getattr(config, "memory", None) is not None:
        raise ValueError(f"model.config is {name}, which has memory: name the config of a decoder without")
    _check_known(type(config), settings, set())
    return type(config)(**{**config.to_dict(), **settings})


def _written(settings: dict[str, Any]) -> PreTrainedConfig:
    family = settings.pop("model_type", None)
    if family is None:
        raise ValueError("model.config is not set and model.settings has no model_type: one of them names the family")
    try:
        kind = type(AutoConfig.for_model(family))
    except ValueError as error:
        raise ValueError(f"model.settings.model_type is {family!r}, no family of transformers") from error
    _check_known(kind, settings, OLDER_NAMES)
    return kind(**settings)


def _check_known(kind: type[PreTrainedConfig], settings: Mapping[str, Any], others: set[str]) -> None:
    known = {field.name for field in dataclasses.fields(kind)} | set(kind.attribute_map) | others
    for key in settings:
        if key not in known:
            near = ["rope_parameters"] if key in OLDER_NAMES else difflib.get_close_matches(key, sorted(known), n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"model.settings.{key} is no setting of {kind.__name__}{hint}")


def random_decoder(config: PreTrainedConfig) -> PreTrainedModel:
    """A decoder of this architecture, randomly initialised in float32.

    Raises:
        ValueError: AutoModelForCausalLM makes none of such a config.
    """
    try:
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention())
    except ValueError as error:
        raise ValueError(f"{type(config).__name__} makes no decoder: {str(error).splitlines()[0]:.200}") from error
