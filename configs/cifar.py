"""The paper's ConstNet-16-10 on CIFAR-10, with all the settings of its code.

    python -m zerojax.main --config=configs/cifar.py

300 epochs of 390 steps; meant for a GPU or TPU (17.1 million parameters). Perturbation 'none' and
determinism 'hardware': whatever asymmetry there is comes from the kernels, as in the paper.

    python -m zerojax.main --config=configs/cifar.py:trial

The same pipeline for two CPU cores and two minutes: ConstNet-10-1, 5,000 images, a perturbation of
1e-6, since CPU kernels add no noise of their own.

    python -m zerojax.main --config=configs/cifar.py:cpu

All images and the paper's augmentation on two CPU cores, in about an hour (docs/findings.md, 15):
ConstNet-16-1, 24 epochs, a perturbation of 1e-6.

CIFAR-10 is read through TensorFlow Datasets, from --config.dataset.data_dir or TFDS's own place,
and downloaded and prepared there if it is missing (pip install 'zerojax[prepare]').
"""

from ml_collections import ConfigDict

from zerojax.config import default_config


def get_config(variant: str = '') -> ConfigDict:
    """`variant` is '', 'cpu' or 'trial'."""
    if variant not in ('', 'cpu', 'trial'):
        raise ValueError(
            f"variant {variant!r} of configs/cifar.py: must be 'cpu', 'trial' or left out"
        )
    config = default_config()
    config.num_epochs = 300
    config.eval_every_steps = 390  # an epoch
    config.checkpoint_every_steps = 1950
    config.dataset.name = 'cifar10'
    config.dataset.augment = True
    config.dataset.mean = (125.3, 123.0, 113.9)
    config.dataset.std = (63.0, 62.1, 66.7)
    config.determinism.mode = 'hardware'
    config.optimizer.drop_at = (159 / 300, 219 / 300, 259 / 300)  # from epochs 160, 220, 260 on
    if variant:
        config.model.width = 1
        config.determinism.mode = 'deterministic'
        config.perturbation.kind = 'gaussian'
        config.perturbation.scale = 1e-6
        config.optimizer.learning_rate = 0.1
    if variant == 'cpu':
        config.num_epochs = 24
        config.checkpoint_every_steps = 390
        config.optimizer.drop_at = (0.5, 0.75, 0.9)
    elif variant == 'trial':
        config.num_epochs = None
        config.num_steps = 900
        config.batch_size = 64
        config.log_every_steps = 10
        config.eval_every_steps = 100
        config.checkpoint_every_steps = 300
        config.model.depth = 10
        config.dataset.train_split = 'train[:5000]'
        config.dataset.eval_split = 'test[:1000]'
        config.optimizer.drop_at = (0.6, 0.85)
    return config
