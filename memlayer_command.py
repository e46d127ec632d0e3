"""The console command ``memlayer``; see memlayer/commands/main.py. Outside memlayer, whose import loads torch."""

import memlayer_kernels.short_waits  # noqa: F401, before anything loads torch

# isort: split
from memlayer.commands.main import main

if __name__ == "__main__":
    main()
