"""``python -m memlayer`` is the command ``memlayer``, also for launchers: ``accelerate launch -m memlayer pretrain``.

Python imports the package first, and with it torch, so that threads which wait for work spin as long as OpenMP has it
unless the environment says otherwise; see kernels/short_waits.py.
"""

from memlayer.commands.main import main

if __name__ == "__main__":
    main()
