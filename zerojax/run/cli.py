"""The command line: from flags to a checked config and a workdir."""

import logging as python_logging
import pathlib
import sys
import warnings
from collections.abc import Callable
from typing import Any

import jax
from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from zerojax import config as config_lib
from zerojax.host import distributed, objectstore
from zerojax.host.errors import RunError, UsageError
from zerojax.host.stop import Stopped


def exit_status(command: Callable[[], object]) -> int:
    """Runs a command; prints what it raises as one line on stderr and returns the exit status."""
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
        if not (isinstance(error, MemoryError) or 'Out of memory' in reason):
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


def parse_flags(
    argv: list[str], *, prefix: str = '', stores: bool = False
) -> tuple[ConfigDict, pathlib.Path]:
    """The checked config and the workdir that a command line (with the program's name) asks for.

    `prefix` goes before the NAME of the default workdir, runs/NAME. With `stores` the workdir may
    be gs://BUCKET/RUN.

    Raises:
        UsageError: names the flag or field, its value, and what is allowed.
    """
    values = flags.FlagValues()
    workdir_flag = flags.DEFINE_string('workdir', None, '', flag_values=values)
    for argument in argv[1:]:
        name = argument.lstrip('-').split('=')[0]
        if argument.startswith('-') and name.startswith('config.'):
            config_lib.check_field_exists(name.removeprefix('config.'))
    try:
        config_flag = config_flags.DEFINE_config_file('config', flag_values=values, sys_argv=argv)
        remaining = values(argv)
        if not config_flag.present:
            raise UsageError('--config: missing; to begin with, --config=configs/digits.py')
        config, source = config_flag.value, config_flags.get_config_filename(values['config'])
        if not isinstance(config, ConfigDict):
            raise UsageError(f'--config={source}: get_config() must return a ConfigDict')
    except UsageError:
        raise
    except Exception as error:  # a config file is a program and may raise anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise UsageError(f'command line: {reason}') from error
    if len(remaining) > 1:
        raise UsageError(f'command line: unexpected argument {remaining[1]!r}')
    config_lib.check(config)
    workdir = workdir_flag.value or default_workdir(source, prefix)
    if '://' in workdir:
        if stores:
            return config, objectstore.open_workdir(workdir)
        raise UsageError(
            f'--workdir={workdir}: must be a folder of a file system; only zerojax.main trains on '
            'object storage, see docs/cloud.md'
        )
    return config, pathlib.Path(workdir)


def make_folder(workdir: pathlib.Path) -> None:
    """Makes the folder of what a command leaves beside runs.

    Raises:
        UsageError: it cannot be written.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f'--workdir={workdir}: cannot be written ({error.strerror}); name another folder'
        ) from None


def take_flag(argv: list[str], name: str) -> str | None:
    """Takes --NAME=VALUE, a flag of one command alone, out of `argv`; its value, or None."""
    values = [each.removeprefix(f'--{name}=') for each in argv if each.startswith(f'--{name}=')]
    argv[:] = [each for each in argv if not each.startswith(f'--{name}=')]
    return values[-1] if values else None


def join_processes(argv: list[str]) -> None:
    """Takes --distributed and --distributed_timeout out of `argv`, and joins the others if told to.

    Raises:
        UsageError: a flag is wrong.
    """
    timeout = take_count(argv, 'distributed_timeout', distributed.TIMEOUT, least=1)
    where = take_flag(argv, 'distributed')
    if where is not None:
        distributed.start(where, timeout)


def take_count(argv: list[str], name: str, default: int, least: int) -> int:
    """Takes --NAME=N out of `argv`.

    Raises:
        UsageError: N is no whole number of at least `least`.
    """
    text = take_flag(argv, name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 10) or int(text) < least:
        raise UsageError(f'--{name}={text}: must be a whole number of at least {least}')
    return int(text)


def default_workdir(source: str, prefix: str = '') -> str:
    """runs/NAME for configs/NAME.py, runs/NAME_VARIANT for configs/NAME.py:VARIANT."""
    file, _, variant = source.partition(':')
    name = prefix + pathlib.PurePath(file).stem
    return f'runs/{name}_{variant}' if variant else f'runs/{name}'
