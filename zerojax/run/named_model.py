"""The model that a flag names: --model=MODULE:FUNCTION."""

import importlib
import traceback
from typing import Any

from zerojax.host.errors import UsageError
from zerojax.measure.own_model import Model

PARTS = '(apply, params, tx, loss, batches)'


def load(name: str) -> Model:
    """What the function returns, as a Model; the module is looked for as by Python's own -m.

    Raises:
        UsageError: the name is no MODULE:FUNCTION, or what it names does not end in a Model.
    """
    where = f'--model={name}'
    module_name, colon, function_name = name.partition(':')
    if not (colon and function_name.isidentifier() and module_name.replace('.', '').isidentifier()):
        raise UsageError(f'{where}: must be MODULE:FUNCTION, such as my_model:parts of my_model.py')
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and f'{module_name}.'.startswith(f'{error.name}.'):
            raise UsageError(
                f'{where}: there is no module {error.name!r} here; start this in the folder of '
                f'{error.name}.py, or put that into PYTHONPATH'
            ) from error
        raise UsageError(f'{where}: {_told(error)}') from error
    except Exception as error:
        raise UsageError(f'{where}: {_told(error)}') from error
    function: Any = getattr(module, function_name, None)
    if not callable(function):
        raise UsageError(f'{where}: {module_name} has no function {function_name!r}')
    try:
        found = function()
        if isinstance(found, tuple) and len(found) == 5:
            found = Model(*found)
    except Exception as error:
        raise UsageError(f'{where}: {_told(error)}') from error
    if not isinstance(found, Model):
        raise UsageError(
            f'{where}: returns {type(found).__name__}; must return {PARTS} or an own_model.Model'
        )
    return found


def _told(error: Exception) -> str:
    """What was raised, and where, in a line."""
    said = '; '.join(line.strip() for line in str(error).strip().splitlines() if line.strip())
    frame = traceback.extract_tb(error.__traceback__)[-1]
    if type(error) is ValueError and 'zerojax' in frame.filename:
        return said  # a sentence of ours
    return f'{type(error).__name__}: {said} ({frame.filename}, line {frame.lineno})'
