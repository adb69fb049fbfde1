"""What all commands have in common: help, signals, streams, exit status."""

import functools
import logging as python_logging
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

from zerojax.host import terminal
from zerojax.host.errors import RunError, UsageError, first_line
from zerojax.host.stop import Stopped


def run_command(
    command: Callable[[list[str]], object],
    argv: list[str],
    documentation: str | None,
    take_signals: Callable[[], None],
) -> int:
    """Runs `command(argv)`, or prints the documentation if asked for help; the exit status.

    Args:
        command: takes the command line.
        argv: the program's name, which may be 'zerojax NAME', and its arguments.
        documentation: the docstring of the command's module.
        take_signals: of `zerojax.host.stop`, called before the command.
    """
    terminal.open_closed_streams()
    # Figures are drawn without Matplotlib's backends; a name that it does not know keeps it from
    # being imported.
    os.environ.pop('MPLBACKEND', None)
    try:
        if {'-h', '--help'} & set(argv[1:]):
            terminal.say(_as_called(documentation or '', argv[0]))
            return 0
        take_signals()
        return exit_status(lambda: command(argv))
    finally:
        terminal.let_broken_streams_go()


def exit_status(command: Callable[[], object]) -> int:
    """Runs a command; prints what it raises as one line on stderr and returns the exit status."""
    status, message = ending(command)
    if message:
        terminal.complain(message)
    return status


def ending(command: Callable[[], object]) -> tuple[int, str]:
    """Runs a command; the exit status, and the sentence that says why, empty for success."""
    wrong_flags = _wrong_xla_flags(os.environ.get('XLA_FLAGS', ''))
    if wrong_flags:
        return 2, f'error: XLA_FLAGS={os.environ["XLA_FLAGS"]}: {wrong_flags}'
    # Slow imports, so only once signals are taken care of.
    try:
        import jax
    except ValueError as error:  # of an environment variable that holds no value of its option
        return 2, f'error: environment: {error}'
    from absl import logging

    from zerojax.host.compilation_cache import use_compilation_cache

    use_compilation_cache()
    # Orbax and TFDS warn of what is normal here, and log errors that they raise as well. Orbax
    # leaves reads behind when one of them fails.
    warnings.filterwarnings('ignore', 'coroutine .* was never awaited', RuntimeWarning)
    if not isinstance(sys.unraisablehook, _WithoutLateOperations):
        sys.unraisablehook = _WithoutLateOperations(sys.unraisablehook)
    logging.set_verbosity(logging.FATAL)
    python_logging.getLogger('asyncio').setLevel(python_logging.CRITICAL)
    python_logging.getLogger('matplotlib').setLevel(python_logging.ERROR)  # fonts, its cache
    try:
        with jax.numpy_dtype_promotion('standard'):  # Flax and optax mix dtypes
            command()
    except UsageError as error:
        return 2, f'error: {error}'
    except RunError as error:
        return 1, f'error: {error}'
    except OSError as error:
        where = f'{error.filename}: ' if error.filename else ''
        return 1, (
            f'error: {where}{error.strerror or error}; mend that, and the same command goes on'
        )
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        reason = first_line(error)
        out_of_memory = 'Out of memory' in reason or 'RESOURCE_EXHAUSTED' in reason
        if not (isinstance(error, MemoryError) or out_of_memory):
            raise
        return 1, (
            f'error: memory does not suffice ({reason}); try a smaller batch_size, model.width or '
            'model.depth'
        )
    except Stopped as stopped:
        return 128 + stopped.signal, str(stopped)
    return 0, ''


def _as_called(documentation: str, program: str) -> str:
    """With `zerojax NAME` for `python -m zerojax.NAME`, if that was called, and all aligned."""
    if not program.startswith('zerojax '):
        return documentation
    before, now = 'python -m zerojax.', 'zerojax '
    aligned = re.sub(rf'^ {{{len(before) - len(now)}}}(?= {{10}})', '', documentation, flags=re.M)
    return aligned.replace(before, now)


@functools.cache
def _wrong_xla_flags(flags: str) -> str | None:
    """What XLA says of flags that it does not take; it ends the process in which it reads them."""
    if not flags:
        return None
    code = 'from jaxlib import xla_client; xla_client.CompileOptions()'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, errors='replace')
    if done.returncode == 0 or 'Traceback' in done.stderr:
        return None
    return done.stderr.partition('] ')[2].partition('\n')[0]


class _WithoutLateOperations:
    """Leaves out what reads and writes of Orbax say that end after one of them has failed."""

    def __init__(self, otherwise: Callable[[Any], object]) -> None:
        self.otherwise = otherwise

    def __call__(self, unraisable: Any) -> None:
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == 'Event loop is closed'):
            self.otherwise(unraisable)
