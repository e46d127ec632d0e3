"""Pretrain a memory model, retrofit memory into a pretrained one, write study texts about lessons, teach them, or
compare methods that teach them.

    python train.py configs/pretrain.yaml
    python train.py configs/pretrain_text.yaml text.sources.mine.files=[my_text.jsonl] text.sources.facts.weight=0.1
    python train.py configs/compare_pretraining.yaml
    python train.py configs/retrofit_smollm2_135m.yaml
    python train.py configs/augment_lessons.yaml base=HuggingFaceTB/SmolLM2-1.7B-Instruct
    python train.py configs/learn_sparse_memory.yaml learn.learning_rate=0.5 output=runs/mine
    python train.py configs/learn_full.yaml data.facts=my_facts.jsonl output=runs/mine
    python train.py configs/compare.yaml output=runs/mine
    accelerate launch train.py configs/pretrain.yaml

The config is YAML; every setting can be overridden as section.key=value. --print-config shows the resolved
configuration and stops. Exit status: 0 done, 1 refused, 2 a wrong command line, 3 retrofitted and written but not
healed, 130 or 143 stopped.
"""

import memlayer_kernels.short_waits  # noqa: F401, before anything loads torch

# isort: split
import sys

from memlayer.commands import training


def main() -> None:
    training.main("train.py", __doc__, sys.argv[1:])


if __name__ == "__main__":
    main()
