"""ConstNet-10-1 on scikit-learn's 8x8 digits: the whole phenomenon on a laptop, offline.

    python -m zerojax.main --config=configs/digits.py
    python -m zerojax.main --config=configs/digits.py --config.perturbation.kind=none

The first adds 1e-6 * N(0, 1) to the initial weights and learns; the second does not, keeps all
features identical to the bit, and cannot learn. Accuracies and times: docs/results.md.
"""

from ml_collections import ConfigDict

from zerojax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.num_steps = 700
    config.log_every_steps = 5
    config.eval_every_steps = 50
    config.checkpoint_every_steps = 100
    config.model.depth = 10
    config.model.width = 1
    config.dataset.name = 'digits'
    config.perturbation.kind = 'gaussian'
    config.perturbation.scale = 1e-6
    config.optimizer.learning_rate = 0.1
    config.optimizer.weight_decay = 1e-2  # few images: the paper's 5e-4 overfits
    config.optimizer.drop_at = (0.6, 0.85)
    return config
