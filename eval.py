"""Ask a checkpoint and what learning runs made of it: memlayer/commands/evaluating.py, as a script of the checkout.

python eval.py runs/pretrain runs/learn_sparse_memory runs/learn_lora --output runs/report
"""

import memlayer_kernels.short_waits  # noqa: F401, before anything loads torch

# isort: split
import sys

from memlayer.commands import evaluating


def main() -> None:
    evaluating.main("eval.py", sys.argv[1:], "python eval.py")


if __name__ == "__main__":
    main()
