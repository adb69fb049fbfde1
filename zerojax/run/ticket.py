"""Lottery tickets: what a run of `pruning.*` starts from."""

from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from zerojax.host import paths
from zerojax.host.checkpoint import Checkpoints, has_checkpoint
from zerojax.host.errors import UsageError
from zerojax.step import TrainState, pruning

Ticket = dict[str, Any]


def load_ticket(config: ConfigDict, shapes: TrainState) -> Ticket | None:
    """The lottery ticket {'params', 'batch_stats', 'mask'} to start from; None without pruning.

    The mask comes from the final weights of the run in `config.pruning.source`, the weights from
    its checkpoint of `config.pruning.rewind_step`.

    Raises:
        UsageError: the source has not finished, is of another network, or lacks the checkpoint.
    """
    settings = config.pruning
    if not settings.source:
        return None
    source = paths.meant(settings.source, 'pruning.source')
    where = f'pruning.source={str(paths.shown(source))!r}'
    obstacle = paths.why_no_folder(source, must_exist=True)
    if obstacle or not ((source / 'summary.json').exists() and has_checkpoint(source)):
        raise UsageError(f'{where}: holds no finished run' + (f', {obstacle}' if obstacle else ''))
    with Checkpoints(source / 'checkpoints', read_only=True) as checkpoints:
        steps = checkpoints.steps
        if settings.rewind_step not in steps:
            raise UsageError(
                f'pruning.rewind_step={settings.rewind_step}: {where} keeps checkpoints of the '
                f'steps {steps}; run it with keep_checkpoints_at=({settings.rewind_step},)'
            )
        trained = checkpoints.read_variables(steps[-1])['params']
        start = checkpoints.read_variables(settings.rewind_step)
    for name, ours in (('params', shapes.params), ('batch_stats', shapes.batch_stats)):
        theirs = jax.tree.map(lambda x: (x.shape, x.dtype), start[name])
        if theirs != jax.tree.map(lambda x: (x.shape, x.dtype), ours):
            raise UsageError(f'{where}: holds a run of another network than model.* describes')
    if settings.mask == 'magnitude':
        mask = pruning.magnitude_mask(trained, settings.fraction, settings.layers)
    else:
        key = jax.random.key(settings.seed)
        mask = pruning.random_mask(trained, settings.fraction, key, settings.layers)
    return {
        'params': jax.tree.map(np.multiply, start['params'], jax.device_get(mask)),
        'batch_stats': start['batch_stats'],
        'mask': mask,
    }
