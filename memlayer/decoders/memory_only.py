"""Save the memory of a retrofitted model without the base model it was attached to.

A folder of memory names its base model and holds what memory brought: tables, product keys, gates, outputs. The base
is loaded from where it came from, and refused unless it is the same to the bit.
"""

import json
import os
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from memlayer.decoders.attach import add_memory, memory_parameters
from memlayer.decoders.classes import MODEL_TYPE, memory_dtype
from memlayer.decoders.fingerprint import fingerprint
from memlayer.layers.config import DTYPES, MemoryConfig

CONFIG_FILE, WEIGHTS_PATTERN = "memory_only_config.json", "memory{suffix}.safetensors"
FORMAT = 2


def save_memory(
    model: PreTrainedModel, folder: str | Path, base_model: str | None = None, max_shard_size: str = "50GB"
) -> None:
    """Write ``memory_only_config.json`` and ``memory.safetensors``, in shards where that is larger.

    Args:
        model: a decoder with memory whose other weights are the base model's.
        base_model: folder or hub name of the base; by default where the model was loaded from. Of a folder, the way
            there from ``folder`` is written too, so that both can be moved together.

    Raises:
        ValueError: the model has no memory, nothing says what its base is, or the base has memory itself.
    """
    parameters = memory_parameters(model)
    memory = {**model.config.memory, "dtype": memory_dtype(model)}
    base_model = base_model or model.config.name_or_path
    if not base_model:
        raise ValueError("the model was not loaded from a folder or hub name: say what base_model is")
    local = Path(base_model).is_dir()
    loaded_with_memory = model.attached_dtype is None and base_model == model.config.name_or_path
    if loaded_with_memory or (local and _has_memory(base_model)):
        raise ValueError(f"{base_model} has memory already, it is not the base of this model: say what base_model is")
    config = {
        "format_version": FORMAT,
        "base_model": str(base_model),
        "base_model_from_here": os.path.relpath(base_model, folder) if local else None,
        "base_sha256": fingerprint(_without(model.state_dict(), parameters)),
        "dtype": str(model.dtype).removeprefix("torch."),
        "memory": memory,
    }
    Path(folder).mkdir(parents=True, exist_ok=True)
    weights = {name: parameter.detach() for name, parameter in parameters.items()}
    save_torch_state_dict(weights, folder, filename_pattern=WEIGHTS_PATTERN, max_shard_size=max_shard_size)
    (Path(folder) / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_memory(folder: str | Path, base_model: str | None = None, **loading) -> PreTrainedModel:
    """Load the base model, attach memory and fill it with what ``save_memory`` wrote.

    Args:
        base_model: where the base model is now, if it is not where the folder says.
        **loading: of AutoModelForCausalLM.from_pretrained, for the base model.

    Raises:
        FileNotFoundError: the folder holds no memory, or its base model is not found.
        ValueError: another format, a base model that is not the same to the bit, weights that do not fit, a dtype,
            or ``trust_remote_code`` for a base that nobody but the folder names.
    """
    folder = Path(folder)
    if not (folder / CONFIG_FILE).is_file():
        raise FileNotFoundError(f"no memory in {folder}: {CONFIG_FILE} is missing")
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    if config.get("format_version") != FORMAT:
        raise ValueError(f"{folder / CONFIG_FILE} has format {config.get('format_version')}, expected {FORMAT}")
    if config.get("dtype") not in DTYPES:
        known = ", ".join(DTYPES)
        raise ValueError(f"{folder / CONFIG_FILE} has dtype {config.get('dtype')!r}, must be one of {known}")
    if "dtype" in loading or "torch_dtype" in loading:
        raise ValueError(f"the memory in {folder} was made for its base in {config['dtype']}: convert the loaded model")
    if base_model is None and loading.get("trust_remote_code"):
        raise ValueError(
            f"trust_remote_code would run the code of {config['base_model']}, which {folder} names as its base model: "
            "if you trust it, pass it as base_model"
        )
    memory = MemoryConfig.from_dict(config["memory"])
    base_model = base_model or _base_of(folder, config)
    model = AutoModelForCausalLM.from_pretrained(base_model, dtype=getattr(torch, config["dtype"]), **loading)
    add_memory(model, memory)
    parameters = memory_parameters(model)
    saved = _read(folder)
    names = sorted(parameters.keys() ^ saved.keys())
    if names:
        raise ValueError(f"the memory in {folder} does not fit its config: {names[0]} is in one of them only")
    if fingerprint(_without(model.state_dict(), parameters)) != config["base_sha256"]:
        raise ValueError(f"{base_model} is not the base model that the memory in {folder} was made for")
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.shape != saved[name].shape:
                raise ValueError(f"{name} is {tuple(saved[name].shape)}, expected {tuple(parameter.shape)}")
            parameter.copy_(saved[name])
    return model


def _has_memory(base_model: str | Path) -> bool:
    file = Path(base_model) / "config.json"
    return file.is_file() and json.loads(file.read_text(encoding="utf-8")).get("model_type") == MODEL_TYPE


def _base_of(folder: Path, config: dict) -> str:
    """The base model that a folder names: beside it, as it was given, or a name on the hub."""
    from_here = config.get("base_model_from_here")
    if from_here is None:
        return config["base_model"]
    candidates = [os.path.normpath(folder / from_here), config["base_model"]]
    for candidate in candidates:
        if Path(candidate).is_dir():
            return candidate
    looked = " nor in ".join(dict.fromkeys(candidates))
    raise FileNotFoundError(
        f"the base model of the memory in {folder} is not in {looked}: say where it is with base_model"
    )


def _without(state: dict[str, Tensor], names) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name not in names}


def _read(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob(WEIGHTS_PATTERN.format(suffix="*")))
    if not files:
        raise FileNotFoundError(f"no memory in {folder}: {WEIGHTS_PATTERN.format(suffix='')} is missing")
    saved = {}
    for file in files:
        try:
            saved |= load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged: {error}") from error
    return saved
