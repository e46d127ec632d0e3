"""Import this before torch: OpenMP threads that wait for work then spin for a moment, not for milliseconds.

A spinning thread starts the next operation sooner, but takes a core from whatever else runs. Two processes that spin on
the same cores wait for each other: a pretraining step of 0.3 s took 3 s beside a second one. So threads spin for some
0.4 ms where the cores are idle when the program starts, and for a tenth of that where something runs already
(docs/lab-log.md has both, alone and in company). OpenMP reads its environment once, when torch loads it, so only a
program can ask for this, at its start; a library should not. Whoever sets one of these variables decides. Processes
that the program starts inherit them.
"""

import os
import time

# libgomp counts turns of its waiting loop; LLVM's and Intel's libraries, on macOS and Windows, know the policy alone.
POLICY, TURNS = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"
THEIRS = (POLICY, TURNS, "KMP_BLOCKTIME")
ALONE, IN_COMPANY = "30000", "3000"
CLOCKS = "/proc/stat"  # what the processors did since the system started; Linux alone has it
GLANCE = 0.1  # seconds


def in_company() -> bool:
    """Whether the processors are at work, for a third of a core or more, while this process sleeps."""
    try:
        before = _working()
        time.sleep(GLANCE)
        return _working() - before > GLANCE * os.sysconf("SC_CLK_TCK") / 3
    except (OSError, ValueError):
        return False


def _working() -> int:
    """Ticks of all processors that were neither idle nor waiting for a disk."""
    with open(CLOCKS, encoding="ascii") as file:
        user, nice, system, _idle, _disk, interrupts, soft_interrupts, *_ = map(int, file.readline().split()[1:])
    return user + nice + system + interrupts + soft_interrupts


if not any(name in os.environ for name in THEIRS):
    os.environ.update({POLICY: "passive", TURNS: IN_COMPANY if in_company() else ALONE})
