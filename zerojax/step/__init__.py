"""One pure train step, and all it is made of; knows no config, file or flag.

`create_state` and `make_train_step` are where to begin: a state, and a jitted
(state, batch) -> (state, metrics), for any model (`Model`). Beside them: `batch` (order of
examples, augmentation), `optimizer`, `pruning`, `order` (of additions, a perturbation),
`determinism` (compiler options of a mode), `precision`. What is new in a step goes into
`train_step`; what it must remember, into `TrainState`.
"""

from zerojax.step.determinism import jit_in_mode, jit_without_products
from zerojax.step.eval_step import eval_step_function
from zerojax.step.loss import accuracy, cross_entropy
from zerojax.step.model import Model
from zerojax.step.state import KEY_PURPOSES, TrainState, create_state
from zerojax.step.train_step import (
    Batch,
    Metrics,
    make_train_step,
    make_train_steps,
    train_step_function,
)

__all__ = [
    'KEY_PURPOSES', 'Batch', 'Metrics', 'Model', 'TrainState', 'accuracy', 'create_state',
    'cross_entropy', 'eval_step_function', 'jit_in_mode', 'jit_without_products',
    'make_train_step', 'make_train_steps', 'train_step_function',
]  # fmt: skip
