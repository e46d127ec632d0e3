"""Worker processes that end with the process that started them, whatever ends it.

A pool of the standard library outlives a parent that is killed: its workers finish what they were given and then wait
for more, for ever, with all their memory.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

import torch


@contextmanager
def worker_processes(number: int, threads: int | None = None) -> Iterator[ProcessPoolExecutor]:
    """A pool of spawned processes.

    After an error what runs is finished and nothing more is begun; after an interruption (Ctrl-C, SIGTERM) the
    workers are killed.

    Args:
        threads: of torch in each worker; None leaves it to torch.

    Raises:
        ChildProcessError: a worker was killed.
    """
    others = set(multiprocessing.active_children())
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(number, mp_context=spawn, initializer=_begin, initargs=(threads,))
    try:
        yield pool
    except BrokenProcessPool as error:
        pool.shutdown()
        raise ChildProcessError("a worker process was killed, perhaps for want of memory") from error
    except Exception:
        pool.shutdown(cancel_futures=True)
        raise
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
        pool.shutdown(cancel_futures=True)
        raise
    else:
        pool.shutdown()


def _begin(threads: int | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends its workers
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    if threads is not None:
        torch.set_num_threads(threads)


def _end_with(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os._exit(1)
