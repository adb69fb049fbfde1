"""What all commands have in common: help, signals, exit status."""

import logging as python_logging
import sys
import warnings
from collections.abc import Callable
from typing import Any

from zerojax.host.errors import RunError, UsageError
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
        argv: the program's name and its arguments.
        documentation: the docstring of the command's module.
        take_signals: of `zerojax.host.stop`, called before the command.
    """
    if {'-h', '--help'} & set(argv[1:]):
        print(documentation)
        return 0
    take_signals()
    return exit_status(lambda: command(argv))


def exit_status(command: Callable[[], object]) -> int:
    """Runs a command; prints what it raises as one line on stderr and returns the exit status."""
    # Slow imports, so only once signals are taken care of.
    import jax
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
    try:
        command()
    except UsageError as error:
        _print_error(str(error))
        return 2
    except RunError as error:
        _print_error(str(error))
        return 1
    except OSError as error:
        where = f'{error.filename}: ' if error.filename else ''
        _print_error(f'{where}{error.strerror or error}; mend that, and the same command goes on')
        return 1
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        reason = (str(error).splitlines() or ['MemoryError'])[0]
        out_of_memory = 'Out of memory' in reason or 'RESOURCE_EXHAUSTED' in reason
        if not (isinstance(error, MemoryError) or out_of_memory):
            raise
        _print_error(
            f'memory does not suffice ({reason}); try a smaller batch_size, model.width or '
            'model.depth'
        )
        return 1
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return 128 + stopped.signal
    return 0


class _WithoutLateOperations:
    """Leaves out what reads and writes of Orbax say that end after one of them has failed."""

    def __init__(self, otherwise: Callable[[Any], object]) -> None:
        self.otherwise = otherwise

    def __call__(self, unraisable: Any) -> None:
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == 'Event loop is closed'):
            self.otherwise(unraisable)


def _print_error(message: str) -> None:
    """Whatever it quotes, the message is one line that no terminal takes for a command."""
    printable = ''.join(c if c.isprintable() else repr(c)[1:-1] for c in message)
    print(f'error: {printable}', file=sys.stderr)
