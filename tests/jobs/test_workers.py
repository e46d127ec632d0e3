"""Worker processes end with their parent, and a command that is stopped says so in one line."""

import os
import signal
import time
from pathlib import Path

import pytest
from commands import start

from memlayer.jobs.workers import worker_processes

POOL = """
import os, sys, time
from memlayer.files import write_file
from memlayer.refusals import refusals
from memlayer.jobs.workers import worker_processes

with refusals("pool"), worker_processes(1, threads=1) as pool:
    write_file(sys.argv[-1], str(pool.submit(os.getpid).result()))
    pool.submit(time.sleep, 600).result()
"""


def is_running(pid):
    """Whether a process is there and not just waiting to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(") ")[2][0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize(
    ("sent", "status", "said"),
    [(signal.SIGKILL, -9, ""), (signal.SIGTERM, 143, "pool: stopped\n"), (signal.SIGINT, 130, "pool: stopped\n")],
)
def test_workers_end_with_their_parent_whatever_ends_it(tmp_path, sent, status, said):
    parent = start("-c", POOL, tmp_path / "pid", folder=tmp_path)
    while parent.is_alive() and not (tmp_path / "pid").exists():
        time.sleep(0.05)
    worker = int((tmp_path / "pid").read_text())
    assert is_running(worker)
    os.kill(parent.pid, sent)
    parent.join(30)
    assert parent.exitcode == status
    assert (tmp_path / "stderr").read_text() == said
    deadline = time.monotonic() + 30
    while is_running(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(worker)


def test_a_worker_that_is_killed_is_said_in_a_sentence():
    with pytest.raises(ChildProcessError, match="a worker process was killed"), worker_processes(1) as pool:
        pool.submit(os._exit, 9).result()
