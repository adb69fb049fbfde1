"""ConstNet-10-1 on the digits at a constant learning rate: when does training start?

    python -m experiments.onset
    python -m zerojax.main --config=configs/onset.py --config.perturbation.scale=1e-3

What the experiments on the onset of training begin from: 300 steps, seconds on two CPU cores.
`:long` makes them 1300.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

DIGITS = pathlib.Path(__file__).with_name('digits.py')  # in the wheel too


def get_config(variant: str = '') -> ConfigDict:
    """`variant` is '' or 'long'."""
    if variant not in ('', 'long'):
        raise ValueError(f"variant {variant!r} of configs/onset.py: must be 'long'")
    config = runpy.run_path(str(DIGITS))['get_config']()
    config.num_steps = 1300 if variant == 'long' else 300
    config.log_every_steps = 1
    config.optimizer.weight_decay = 5e-4  # the paper's
    config.optimizer.drop_at = ()
    return config
