"""Hugging Face classes of decoders with memory, made from the class of any decoder when it is asked for.

``LlamaForCausalLM`` gives ``MemoryLlamaForCausalLM``: the same class with memory layers put in by its constructor,
and a config that says ``model_type: memlayer``, so that no program can load such a folder and leave the memory
out. One entry in transformers' Auto classes, made by ``import memlayer``, serves every family: the config.json names
the family as ``base_model_type``. ``AutoModel`` gives the same decoder without its head, and with its memory.
"""

import copy
from functools import cache
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from memlayer.decoders.dense_control import DenseBlock
from memlayer.decoders.export import MAIN, auto_map, write_code
from memlayer.decoders.structure import insert_memory, tables_owner
from memlayer.layers.config import MemoryConfig
from memlayer.layers.memory import MemoryLayer, MemoryTable

MODEL_TYPE = "memlayer"
TAG = "memlayer"  # on the model card that push_to_hub writes
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


class MemoryDecoderConfig(PreTrainedConfig):
    """What AutoConfig makes a config with ``model_type: memlayer`` from; the result is of its family's class."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """The config of a decoder with memory.

        Raises:
            ValueError: transformers has no causal language model of that ``base_model_type``, or the memory section
                has a key or value that does not fit.
        """
        base = config_dict.get("base_model_type")
        if base not in CONFIG_MAPPING:
            raise ValueError(f"base_model_type is {base!r}, which this version of transformers does not know")
        return classes_with_memory(CONFIG_MAPPING[base]).config.from_dict(config_dict, **kwargs)


class MemoryDecoder:
    """What a decoder with memory adds to the Hugging Face class it is derived from."""

    def __init__(self, config: PreTrainedConfig, *args, **kwargs):
        if not config.memory:
            raise ValueError(f"the config of {type(self).__name__} has no memory section; use add_memory on a decoder")
        super().__init__(config, *args, **kwargs)
        insert_memory(self, MemoryConfig.from_dict(config.memory))
        self.replaced_ffns = {}  # never had weights, so there is nothing that remove_memory could give back
        self.attached_dtype = None
        self.add_model_tags(TAG)
        # Made as add_memory makes it, which is not how the family initialises its own layers.
        for memory in (
            tables_owner(self).memory,
            *(m for m in self.modules() if isinstance(m, MemoryLayer | DenseBlock)),
        ):
            for module in memory.modules():
                module._is_hf_initialized = True
        self.post_init()

    def save_pretrained(
        self, save_directory, *args, export_code: bool = False, save_original_format: bool = False, **kwargs
    ) -> None:
        """transformers' own, but tensors are written under the names and in the shapes they have in the model.

        transformers splits and renames the experts of many families on the way to disk, and undoes that by
        ``model_type`` when it loads. A folder with memory has a ``model_type`` of its own, and no other program reads
        it, so nothing is gained by it; and the Trainer looks for the model's own names when it resumes.

        Where processes share a table, all of them have to call this; the first one writes what one process would.

        Args:
            export_code: write the code beside the weights, so that the folder also loads where memlayer is not
                installed, with ``trust_remote_code=True``. A model saved or loaded like that keeps its code from
                then on, in ``push_to_hub`` as well.
            save_original_format: cannot be had.

        Raises:
            ValueError: ``push_to_hub`` is asked for in the same call, which would leave the code behind; or the
                original format is; or memory is in several dtypes, or its base quantised, which loading could not
                restore.
        """
        if save_original_format:
            raise ValueError("save_original_format=True: a model with memory is written as it is, or it would not load")
        if getattr(self, "hf_quantizer", None) is not None:
            raise ValueError(
                "the base model is quantised, and loading would quantise the memory as well: write the memory alone "
                "with memlayer.save_memory"
            )
        self.config.memory = {**self.config.memory, "dtype": memory_dtype(self)}
        if export_code:
            self.config.auto_map = auto_map(*classes_with_memory(self.config.decoder_config_class))
        with_code = bool(getattr(self.config, "auto_map", None))
        if with_code and kwargs.get("push_to_hub"):
            raise ValueError("exported code is uploaded by push_to_hub, called after save_pretrained, not by it")
        if kwargs.get("state_dict") is None and _is_shared_out(self):
            kwargs["state_dict"] = whole_state_dict(self)
            if kwargs["state_dict"] is None:
                return  # another process writes
        super().save_pretrained(save_directory, *args, save_original_format=False, **kwargs)
        if with_code and kwargs.get("is_main_process", True):
            write_code(save_directory)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """transformers' own, which warns of weights that do not fit; here they are refused.

        A ``dtype`` asked for is that of the memory as well; without one the memory has the dtype it was saved in.

        Raises:
            ValueError: weights are missing, left over or of another shape than the config asks for, or a
                ``quantization_config`` is given, which would quantise the memory.
        """
        if kwargs.get("quantization_config") is not None:
            raise ValueError(
                "quantization_config would quantise the memory as well: load the base model with it, and the memory "
                "beside it with memlayer.load_memory"
            )
        if (dtype := kwargs.get("dtype", kwargs.get("torch_dtype"))) not in (None, "auto"):
            config = kwargs.get("config")
            if config is None:
                config = AutoConfig.from_pretrained(
                    pretrained_model_name_or_path, **{name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
                )
            kwargs["config"] = _in_dtype(config, dtype)
        kwargs["ignore_mismatched_sizes"] = True  # reported like the others, a line below
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        if not cls.has_head:  # that of the causal language model is left in the folder
            inside = f"{cls.base_model_prefix}."
            info["unexpected_keys"] = {name for name in info["unexpected_keys"] if name.startswith(inside)}
        misfits = _misfits(info)
        if misfits:
            raise ValueError(f"the weights in {pretrained_model_name_or_path} do not fit its config: {misfits}")
        return (model, info) if output_loading_info else model

    # transformers looks at a class's module to find out; that of this one says nothing of the decoder.
    @classmethod
    def is_custom_code(cls) -> bool:
        """Whether the decoder's code is not transformers' own, whose buffers would then not be made on loading."""
        return cls.decoder_class.is_custom_code()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return cls.decoder_class._can_set_experts_implementation()

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return cls.decoder_class._can_set_attn_implementation()

    @classmethod
    def _from_config(cls, config, **kwargs):
        """Behind AutoModelForCausalLM.from_config; a ``dtype`` asked for is that of the memory as well."""
        if (dtype := kwargs.get("dtype", kwargs.get("torch_dtype"))) is not None:
            config = _in_dtype(config, dtype)
        return super()._from_config(config, **kwargs)


def _in_dtype(config: PreTrainedConfig, dtype: torch.dtype | str) -> PreTrainedConfig:
    config = copy.deepcopy(config)
    config.memory = {**config.memory, "dtype": str(dtype).removeprefix("torch.")}
    return config


def memory_dtype(model: nn.Module) -> str:
    """The dtype of all that memory brought to a model, e.g. "float32".

    Raises:
        ValueError: it is more than one.
    """
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, MemoryLayer | MemoryTable | DenseBlock):
            found |= {p.dtype: f"{name}.{inner}" for inner, p in module.named_parameters()}
    if len(found) > 1:
        (one, first), (other, second), *_ = found.items()
        raise ValueError(f"{first} is {one}, {second} {other}: memory is saved in one dtype, convert one of them")
    return str(*found).removeprefix("torch.")


def tables_of(model: nn.Module) -> dict[str, MemoryTable]:
    """The tables of a bare model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MemoryTable)}


def whole_state_dict(model: nn.Module) -> dict[str, torch.Tensor] | None:
    """The state dict of a model that several processes share, as one process would have it.

    Tables may be split by columns, other weights sharded by FSDP2. All processes have to call it; the first one gets
    it, the others get None.
    """
    here = model.state_dict(keep_vars=True)  # in which tied weights are one parameter
    whole = {id(t): t.detach().full_tensor().cpu() for t in here.values() if _is_sharded(t)}
    state = {name: whole[id(t)] if _is_sharded(t) else t.detach() for name, t in here.items()}
    is_first = is_first_of_all(model)
    for name, table in tables_of(model).items():
        if table.columns is not None:
            state[f"{name}.weight"] = table.columns.whole_table(table.weight, keep=is_first)
    return state if is_first else None


def is_first_of_all(model: nn.Module) -> bool:
    """Of the processes that share a model, whether this is the one that writes what one process would."""
    return not (_is_shared_out(model) and torch.distributed.get_rank())


def _is_shared_out(model: nn.Module) -> bool:
    split = any(table.columns is not None for table in tables_of(model).values())
    return split or any(map(_is_sharded, model.parameters()))


def _is_sharded(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "full_tensor")  # a DTensor


def _misfits(info: dict[str, Any]) -> str:
    """What of a loading report is wrong, a few names of each kind."""
    shapes = [f"{name} is {tuple(found)}, expected {tuple(wanted)}" for name, found, wanted in info["mismatched_keys"]]
    kinds = {"missing": info["missing_keys"], "not in the model": info["unexpected_keys"], "of another shape": shapes}
    return "; ".join(f"{len(names)} {kind} ({_some(names)})" for kind, names in kinds.items() if names)


def _some(names, number: int = 3) -> str:
    names = sorted(names)
    return ", ".join(names[:number]) + (", ..." if len(names) > number else "")


class Classes(NamedTuple):
    """The classes with memory of a family; ``base`` is None where AutoModel has no class for its config."""

    config: type[PreTrainedConfig]
    causal_lm: type[PreTrainedModel]
    base: type[PreTrainedModel] | None


@cache
def classes_with_memory(base_config: type[PreTrainedConfig]) -> Classes:
    """The config and model classes with memory of a family, registered with the Auto classes.

    Raises:
        ValueError: transformers has no causal language model for this config.
    """
    causal_lm, base_model = (m.get(base_config, None) for m in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING))
    if causal_lm is None:
        raise ValueError(f"AutoModelForCausalLM has no model for {base_config.__name__}")
    if isinstance(base_model, tuple):  # several, of which AutoModel takes the first
        base_model = base_model[0]

    class Config(base_config):
        model_type = MODEL_TYPE
        decoder_config_class = base_config
        base_model_type: str = base_config.model_type
        memory: dict | None = None

        def __post_init__(self, **kwargs):
            super().__post_init__(**kwargs)
            if self.memory is not None:
                MemoryConfig.from_dict(self.memory)

    def named(made: type, base: type) -> type:
        made.__name__ = made.__qualname__ = f"Memory{base.__name__}"
        made.__doc__ = f"{base.__name__} with memory layers; see memlayer.add_memory."
        return made

    def with_memory(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
        class Model(MemoryDecoder, base):
            config_class = Config
            decoder_class = base
            has_head = base is causal_lm

        return named(Model, base)

    classes = Classes(named(Config, base_config), with_memory(causal_lm), base_model and with_memory(base_model))
    AutoModelForCausalLM.register(Config, classes.causal_lm, exist_ok=True)
    if classes.base is not None:
        AutoModel.register(Config, classes.base, exist_ok=True)
    return classes


def __getattr__(name: str) -> type:
    """``MemoryLlamaForCausalLM`` and its like, by name: pickle looks for them here."""
    base = getattr(transformers, name.removeprefix("Memory"), None) if name.startswith("Memory") else None
    for made in classes_with_memory(getattr(base, "config_class", base)) if isinstance(base, type) else ():
        if made is not None and made.__name__ == name:
            return made
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def with_memory_section(config: PreTrainedConfig, memory: dict[str, Any]) -> PreTrainedConfig:
    """A copy of a decoder's config that has a memory section."""
    made = copy.deepcopy(config)
    made.__class__ = classes_with_memory(type(config)).config
    made.base_model_type, made.memory = config.model_type, memory
    return made


def without_memory_section(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of a config with memory as the decoder's config it was made from."""
    made = copy.deepcopy(config)
    base = config.decoder_config_class  # not the decoder's config_class: several families share LlamaForCausalLM
    del made.base_model_type, made.memory
    made.__dict__.pop("memory_patches", None)  # what memlayer.patch wrote into it
    made.__class__ = base
    if MAIN in str(getattr(made, "auto_map", "")):  # exported code of ours
        del made.auto_map
    if made.architectures:  # written by save_pretrained
        made.architectures = [name.removeprefix("Memory") for name in made.architectures]
    return made


def register() -> None:
    """Let AutoConfig and AutoModelForCausalLM load decoders with memory."""
    AutoConfig.register(MODEL_TYPE, MemoryDecoderConfig, exist_ok=True)
