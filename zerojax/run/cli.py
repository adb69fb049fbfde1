"""Flags: from a command line to a checked config and a workdir.

A command names its own flags with `text_flags`, and `parse_flags` adds --config and --workdir to
them; one without a config calls `parse`. `--NAME=VALUE` and `--NAME VALUE` are the same. A config
is a file, FILE.py[:VARIANT], or one that comes with the package, zerojax:NAME[:VARIANT].
"""

import contextlib
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

import zerojax
from zerojax import config as config_lib
from zerojax.host import distributed, objectstore, paths
from zerojax.host.compilation_cache import leave_compilation_cache
from zerojax.host.errors import UsageError

PACKAGED = 'zerojax:'  # what the name of a config that comes with the package begins with
# Of a command whose runs may be on several processes, for `join_processes`.
DISTRIBUTED = {'distributed': None, 'distributed_timeout': str(distributed.TIMEOUT)}


def text_flags(**defaults: str | None) -> flags.FlagValues:
    """Flags by name, with their defaults; once parsed, attributes have their values."""
    values = flags.FlagValues()
    for name, default in defaults.items():
        flags.DEFINE_string(name, default, '', flag_values=values)
    return values


def parse_flags(
    argv: list[str],
    values: flags.FlagValues | None = None,
    *,
    config_file: str | None = None,
    workdir: str = 'runs/NAME',
    stores: bool = False,
) -> tuple[ConfigDict, pathlib.Path]:
    """The checked config and the workdir that a command line (with the program's name) asks for.

    Args:
        argv: the command line.
        values: the command's own flags, which are parsed too.
        config_file: taken without --config; None: it must be given.
        workdir: taken without --workdir; NAME in it stands for that of the config, see `name_of`.
        stores: whether the workdir may be gs://BUCKET/RUN.

    Raises:
        UsageError: names the flag or field, its value, and what is allowed.
    """
    values = text_flags() if values is None else values
    flags.DEFINE_string('workdir', None, '', flag_values=values)
    fields_named(argv, 'config')
    for kind, parser in _PARSERS.items():
        config_flags.register_flag_parser_for_type(kind, _OrNone(parser))
    with _mistakes():  # a default file is run at once
        config_flags.DEFINE_config_file('config', config_file, flag_values=values, sys_argv=argv)
    values['config'].parser = _ConfigFile(values['config'].parser)
    parse(argv, values)
    if not (values['config'].present or config_file):
        raise UsageError('--config: missing; to begin with, --config=zerojax:digits')
    source = config_flags.get_config_filename(values['config'])
    if not isinstance(values.config, ConfigDict):
        raise UsageError(f'--config={source}: get_config() must return a ConfigDict')
    config_lib.check(values.config)
    where = values.workdir or workdir.replace('NAME', name_of(source))
    if '://' not in where:
        return values.config, paths.meant(where, f'--workdir={where}')
    if not stores:
        raise UsageError(
            f'--workdir={where}: must be a folder of a file system; only zerojax.main trains on '
            'object storage, see docs/cloud.md'
        )
    return values.config, objectstore.open_workdir(where)


def parse(argv: list[str], values: flags.FlagValues, *, positional: bool = False) -> list[str]:
    """Parses a command line (with the program's name); the arguments that are no flags.

    Raises:
        UsageError: names the flag and its value; or there are such arguments without `positional`.
    """
    values.set_gnu_getopt()  # flags may follow them
    with _mistakes():
        arguments = values(argv)[1:]
    if arguments and not positional:
        raise UsageError(f'command line: unexpected argument {arguments[0]!r}')
    for name in values:
        # As of a variable of the shell that is not set. A field may be empty.
        if values[name].value == '' and values[name].present and '.' not in name:
            raise UsageError(f'--{name}=: is empty; give it a value, or leave it out')
    return arguments


class _OrNone(flags.ArgumentParser[Any]):
    """Takes what another parser takes, or None; `config.check` says whether the field may be so."""

    def __init__(self, parser: flags.ArgumentParser[Any]) -> None:
        self._parser = parser
        self.syntactic_help = parser.syntactic_help

    def parse(self, argument: Any) -> Any:
        return None if argument == 'None' else self._parser.parse(argument)

    def flag_type(self) -> str:
        return self._parser.flag_type()


# Of ml_collections, for the types of the fields that may be None.
_PARSERS: dict[type, flags.ArgumentParser[Any]] = {
    int: flags.IntegerParser(),
    float: flags.FloatParser(),
    str: flags.ArgumentParser(),
}


class _ConfigFile(flags.ArgumentParser[Any]):
    """Runs a config's file as another parser does, where the user means it and if it is there."""

    def __init__(self, parser: flags.ArgumentParser[Any]) -> None:
        self._parser = parser

    def parse(self, argument: str) -> Any:
        where = f'--config={argument}'
        if argument.startswith(PACKAGED):
            argument = packaged_config(argument)
        name, colon, variant = argument.partition(':')
        file = paths.meant(argument if '://' in argument else name, where)
        try:
            file.open().close()
        except OSError as error:
            file_name = f': {file}; what follows the colon is a variant' if colon else ''
            raise UsageError(f'{where}: cannot be read ({error.strerror}{file_name})') from error
        return self._parser.parse(f'{file}{colon}{variant}')

    def flag_type(self) -> str:
        return self._parser.flag_type()


def packaged_config(argument: str) -> str:
    """The FILE.py[:VARIANT] that zerojax:NAME[:VARIANT] stands for.

    Raises:
        UsageError: the package holds no config of this name.
    """
    package = pathlib.Path(zerojax.__file__).parent
    folder = package / 'configs'  # as the wheel has it
    if not folder.is_dir():
        folder = package.parent / 'configs'  # as the checkout has it
    name, colon, variant = argument.removeprefix(PACKAGED).partition(':')
    names = sorted(file.stem for file in folder.glob('*.py'))
    if name not in names:
        there = ', '.join(f'{PACKAGED}{each}' for each in names)
        raise UsageError(f'--config={argument}: no such config; must be one of {there}')
    return f'{folder / name}.py{colon}{variant}'


@contextlib.contextmanager
def _mistakes() -> Iterator[None]:
    """Makes a UsageError of anything: a config file is a program and may raise what it likes."""
    try:
        yield
    except Exception as error:
        if isinstance(error.__context__, UsageError):
            raise error.__context__ from None
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise UsageError(f'command line: {reason}') from error


def flags_given(argv: list[str]) -> list[str]:
    """Names of the flags of a command line."""
    return [each.lstrip('-').split('=')[0] for each in argv[1:] if each.startswith('-')]


def fields_named(argv: list[str], group: str) -> list[str]:
    """The config's fields that a command line names as --GROUP.FIELD.

    Raises:
        UsageError: there is no such field.
    """
    group = f'{group}.'
    fields = [name.removeprefix(group) for name in flags_given(argv) if name.startswith(group)]
    for field in fields:
        config_lib.check_field_exists(field)
    return fields


def count(values: flags.FlagValues, name: str, *, least: int) -> int:
    """The whole number that a flag of text holds.

    Raises:
        UsageError: it holds something else, or less than `least`.
    """
    text = getattr(values, name)
    if not (text.isascii() and text.isdigit() and len(text) < 10) or int(text) < least:
        raise UsageError(f'--{name}={text}: must be a whole number of at least {least}')
    return int(text)


def join_processes(values: flags.FlagValues) -> None:
    """Joins the other processes if the flags `DISTRIBUTED` say so; before any use of a device.

    Raises:
        UsageError: one of them is wrong.
    """
    timeout = count(values, 'distributed_timeout', least=1)
    if values.distributed is not None:
        leave_compilation_cache()
        distributed.start(values.distributed, timeout)


def make_folder(workdir: pathlib.Path) -> None:
    """Makes the folder of what a command leaves beside runs.

    Raises:
        UsageError: it cannot be written.
    """
    paths.to_write(workdir, f'--workdir={workdir}')
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=workdir).close()
    except OSError as error:
        raise UsageError(
            f'--workdir={workdir}: cannot be written ({error.strerror}); name another folder'
        ) from None


def name_of(source: str) -> str:
    """NAME for configs/NAME.py or zerojax:NAME, NAME_VARIANT with :VARIANT behind it."""
    file, _, variant = source.removeprefix(PACKAGED).partition(':')
    name = pathlib.PurePath(file).stem
    return f'{name}_{variant}' if variant else name
