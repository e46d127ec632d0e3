"""What a user can mend is one sentence; a bug of ours keeps its traceback."""

import errno
import os
import signal

import pytest

from memlayer.refusals import refusals


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ValueError("seed is -1"), "seed is -1"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a.txt"), "a.txt: No such file or directory"),
        (OSError(errno.ENOSPC, "No space left on device"), "no space is left on the device; make room"),
        (ModuleNotFoundError("No module named 'wandb'"), "a package is missing: No module named 'wandb'"),
        (RuntimeError("this requires wandb to be installed."), "this requires wandb to be installed."),
    ],
)
def test_what_a_user_can_mend_is_one_sentence_and_status_1(capsys, error, sentence):
    with pytest.raises(SystemExit) as ended, refusals("x.py"):
        raise error
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"x.py: {sentence}")


@pytest.mark.parametrize(
    "bug", [RuntimeError("shapes differ"), TypeError("x"), ImportError("no", name="memlayer.jobs"), AssertionError()]
)
def test_a_bug_is_raised_as_it_is(bug):
    with pytest.raises(type(bug)) as raised, refusals("x.py"):
        raise bug
    assert raised.value is bug


def test_sigterm_is_status_143_cleans_up_and_gives_the_note(capsys):
    before, cleaned = signal.getsignal(signal.SIGTERM), []

    def work():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        except KeyboardInterrupt as stop:
            stop.add_note("stopped at step 3")
            raise
        finally:
            cleaned.append(True)

    with pytest.raises(SystemExit) as ended, refusals("x.py"):
        work()
    assert (ended.value.code, cleaned) == (143, [True])
    assert capsys.readouterr().err == "x.py: stopped at step 3\n"
    assert signal.getsignal(signal.SIGTERM) is before
