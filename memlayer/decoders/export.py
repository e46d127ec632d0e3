"""Write the code of a model with memory beside its weights, so that it loads where memlayer is not installed.

What is written are the very files that run here, importing each other relatively, over plain_ops.py instead of the
kernels; ``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`` finds them by ``auto_map``.
"""

import re
import shutil
from pathlib import Path

MAIN = "modeling_memlayer"
# Module of memlayer -> name in the exported folder.
FILES = {
    "checks": "memlayer_checks",
    "decoders.classes": MAIN,
    "decoders.controls": "memlayer_controls",
    "decoders.dense_control": "memlayer_dense_control",
    "decoders.export": "memlayer_export",
    "decoders.plain_ops": "memlayer_plain_ops",
    "decoders.shuffled_address": "memlayer_shuffled_address",
    "decoders.structure": "memlayer_structure",
    "layers.config": "memlayer_memory_config",
    "layers.costs": "memlayer_costs",
    "layers.memory": "memlayer_memory",
    "layers.product_keys": "memlayer_product_keys",
}
HEADER = "# Part of memlayer, Apache License 2.0; written by save_pretrained(export_code=True).\n"


def auto_map(_config: type, causal_lm: type, base: type | None) -> dict[str, str]:
    """What config.json says of the exported classes."""
    models = {"AutoModelForCausalLM": causal_lm, "AutoModel": base}
    named = {auto: f"{MAIN}.{model.__name__}" for auto, model in models.items() if model is not None}
    return {"AutoConfig": f"{MAIN}.MemoryDecoderConfig"} | named


def write_code(folder: str | Path) -> None:
    """Write the files; from exported code, copies of those that run."""
    here = Path(__file__)
    for name, exported in FILES.items():
        target = Path(folder) / f"{exported}.py"
        if here.stem == FILES["decoders.export"]:
            shutil.copyfile(here.with_name(target.name), target)
        else:
            source = here.parents[1].joinpath(*name.split(".")).with_suffix(".py")
            target.write_text(HEADER + _relative(source.read_text(encoding="utf-8")), encoding="utf-8")


def _relative(source: str) -> str:
    """Imports of ours made relative to the exported folder."""
    source = source.replace("from memlayer_kernels.ops import", f"from .{FILES['decoders.plain_ops']} import")
    ours = re.compile(r"^from memlayer\.([\w.]+) import", flags=re.M)
    return ours.sub(lambda found: f"from .{FILES[found[1]]} import", source)
