"""What is printed, be it read by a person, by a program that has seen enough, or by nobody.

Nothing that is computed or saved depends on it, so a stream ends no run, whatever it is: closed,
None, full, of another encoding, or an object of someone else's with hardly a method.
"""

import contextlib
import os
import sys
from typing import Any


def say(text: str) -> bool:
    """Prints on stdout; whether that was done, or the reader has gone on purpose (`| head`)."""
    return _write(sys.stdout, text)


def complain(message: str) -> bool:
    """`say`, on stderr. Whatever it quotes, it is one line that no terminal takes for a command."""
    printable = ''.join(c if c.isprintable() else repr(c)[1:-1] for c in message)
    return _write(sys.stderr, printable)


def _write(stream: Any, text: str) -> bool:
    try:
        encoding = getattr(stream, 'encoding', None) or 'utf-8'
        stream.write(text.encode(encoding, 'backslashreplace').decode(encoding) + '\n')
        stream.flush()
    except BrokenPipeError:
        return True
    except Exception:
        return False
    return True


def is_terminal(stream: Any) -> bool:
    """Whether someone is there to watch a line change."""
    try:
        return bool(stream.isatty())
    except Exception:
        return False


def open_closed_streams() -> None:
    """Has what the process was started without (`2>&-`) lead nowhere.

    Else the next file that it opens is descriptor 2, and what libraries print is written into it.
    """
    for number, name in enumerate(('stdin', 'stdout', 'stderr')):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, 'w' if number else 'r', closefd=False))


def let_broken_streams_go() -> None:
    """Has Python, which at its end flushes them once more, find nothing to complain of."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except Exception:
            with contextlib.suppress(Exception):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
