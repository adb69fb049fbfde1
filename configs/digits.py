"""ConstNet-10-1 on scikit-learn's 8x8 digits: the whole phenomenon on a laptop, offline.

    python -m zerojax.main --config=configs/digits.py
    python -m zerojax.main --config=configs/digits.py --config.perturbation.kind=none

The first adds 1e-6 * N(0, 1) to the initial weights and learns; the second does not, keeps all
features identical to the bit, and cannot learn. Accuracies: docs/results.md.

    python -m zerojax.main --config=configs/digits.py:wide

ConstNet-10-10 at the paper's learning rate, 0.03, since after small noise it dies at 0.1: its last
ReLUs end at 0. A hundred times the arithmetic.
"""

from ml_collections import ConfigDict

from zerojax.config import default_config


def get_config(variant: str = '') -> ConfigDict:
    """`variant` is '' or 'wide'."""
    if variant not in ('', 'wide'):
        raise ValueError(f"variant {variant!r} of configs/digits.py: must be 'wide' or left out")
    config = default_config()
    config.num_steps = 700
    config.log_every_steps = 5
    config.eval_every_steps = 50
    config.checkpoint_every_steps = 100
    config.model.depth = 10
    config.model.width = 10 if variant == 'wide' else 1
    config.dataset.name = 'digits'
    config.perturbation.kind = 'gaussian'
    config.perturbation.scale = 1e-6
    config.optimizer.learning_rate = 0.03 if variant == 'wide' else 0.1
    config.optimizer.weight_decay = 1e-2  # few images: the paper's 5e-4 overfits
    config.optimizer.drop_at = (0.6, 0.85)
    return config
