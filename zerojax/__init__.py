"""How much symmetry breaking does a network of identical features need before it can learn?

Import the module you need: `from zerojax import models, step, symmetry`. Importing the package
itself imports nothing else, takes no device and changes no global state. What is public is what
`__all__` names here, and `__all__` of these modules; all else may change.
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zerojax import config, interop, models, perturb, step, symmetry
    from zerojax.measure import kinks, metrics, noise, own_model, stability
    from zerojax.models import initializers
    from zerojax.run import train
    from zerojax.symmetry import quotient

__version__ = '0.2.0'
__all__ = [
    'config', 'initializers', 'interop', 'kinks', 'metrics', 'models', 'noise', 'own_model',
    'perturb', 'quotient', 'stability', 'step', 'symmetry', 'train',
]  # fmt: skip

# Public modules that live in a room; `from zerojax import metrics` loads them.
_ROOMS = {
    'initializers': 'models',
    'kinks': 'measure',
    'metrics': 'measure',
    'noise': 'measure',
    'own_model': 'measure',
    'quotient': 'symmetry',
    'stability': 'measure',
    'train': 'run',
}


def __getattr__(name: str) -> ModuleType:
    if name not in __all__:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    room = f'{_ROOMS[name]}.' if name in _ROOMS else ''
    return importlib.import_module(f'{__name__}.{room}{name}')
