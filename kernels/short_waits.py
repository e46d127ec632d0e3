"""Import this before torch: OpenMP threads that wait for work then spin for a moment, not for milliseconds.

A spinning thread starts the next operation sooner, but takes a core from whatever else runs. Two processes that spin on
the same cores wait for each other: a pretraining step of 0.3 s took 3 s beside a second one, and takes 0.7 s with this,
which costs up to a twentieth where nothing else runs (docs/lab-log.md). OpenMP reads its environment once, when torch
loads it, so only a program can ask for this, at its start; a library should not. Whoever sets one of these variables
decides. Processes that the program starts inherit them.
"""

import os

# libgomp counts turns of its waiting loop; LLVM's and Intel's libraries, on macOS and Windows, know the policy alone.
SETTINGS = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "3000"}
THEIRS = (*SETTINGS, "KMP_BLOCKTIME")

if not any(name in os.environ for name in THEIRS):
    os.environ.update(SETTINGS)
