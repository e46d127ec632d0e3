"""How a command ends that cannot do what it was asked, or that is stopped: one line, and a status that says which.

What a user can mend is one sentence and status 1: bad input (ValueError), files (OSError), a package that is not
installed. Ctrl-C is status 130 and SIGTERM 143, as shells have it. Anything else is a bug of ours and keeps its
traceback.
"""

import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

from memlayer.files import reason

INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
NOT_INSTALLED = re.compile(r"requires .+ to be installed")  # transformers says so in a RuntimeError


class Terminated(KeyboardInterrupt):
    """SIGTERM: whatever cleans up after Ctrl-C does so after this."""


@contextmanager
def refusals(program: str) -> Iterator[None]:
    """The context of a command's work; notes on a KeyboardInterrupt say where the command stopped.

    Raises:
        SystemExit: with the one line on standard error.
    """
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    except KeyboardInterrupt as stop:
        status = TERMINATED if isinstance(stop, Terminated) else INTERRUPTED
        _end(program, next(iter(getattr(stop, "__notes__", [])), "stopped"), status)
    except OSError as error:
        file = f"{error.filename}: " if error.filename and error.strerror else ""
        _end(program, file + reason(error), 1)
    except ImportError as error:
        if (error.name or "").startswith("memlayer"):
            raise
        _end(program, f"a package is missing: {error}", 1)
    except RuntimeError as error:
        if not NOT_INSTALLED.search(str(error)):
            raise
        _end(program, str(error), 1)
    except (ValueError, SafetensorError) as error:
        _end(program, str(error), 1)
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(_signal: int, _frame) -> None:
    raise Terminated


def _end(program: str, sentence: str, status: int) -> None:
    print(f"{program}: {' '.join(map(str.strip, sentence.splitlines()))}", file=sys.stderr)
    sys.exit(status)
