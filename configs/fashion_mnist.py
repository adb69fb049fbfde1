"""The paper's ConstNet-16-10 and training settings on Fashion-MNIST (28x28, one channel).

    python -m zerojax.main --config=configs/fashion_mnist.py

300 epochs of 468 steps; meant for a GPU or TPU (17.1 million parameters). Perturbation 'none' and
determinism 'hardware': whatever asymmetry there is comes from the kernels.

    python -m zerojax.main --config=configs/fashion_mnist.py:trial

The same pipeline for two CPU cores and two minutes: ConstNet-10-1, 5,000 images, a perturbation of
1e-6, since CPU kernels add no noise of their own.

    python -m zerojax.main --config=configs/fashion_mnist.py:cpu

All images on a CPU: ConstNet-10-1, a perturbation of 1e-6; 26 minutes on one core of an AMD EPYC.
What it reaches: docs/findings.md, 14.

Fashion-MNIST is read through TensorFlow Datasets, from --config.dataset.data_dir or TFDS's own
place, and downloaded and prepared there if it is missing (pip install 'zerojax[prepare]').
"""

from ml_collections import ConfigDict

from zerojax.config import default_config


def get_config(variant: str = '') -> ConfigDict:
    """`variant` is '', 'cpu' or 'trial'."""
    if variant not in ('', 'cpu', 'trial'):
        raise ValueError(
            f"variant {variant!r} of configs/fashion_mnist.py: must be 'cpu', 'trial' or left out"
        )
    config = default_config()
    config.num_epochs = 300
    config.eval_every_steps = 468  # an epoch
    config.checkpoint_every_steps = 2340
    config.dataset.name = 'fashion_mnist'
    config.dataset.augment = True
    config.determinism.mode = 'hardware'
    config.optimizer.drop_at = (159 / 300, 219 / 300, 259 / 300)  # from epochs 160, 220, 260 on
    if variant:
        config.model.depth = 10
        config.model.width = 1
        config.determinism.mode = 'deterministic'
        config.perturbation.kind = 'gaussian'
        config.perturbation.scale = 1e-6
        config.optimizer.learning_rate = 0.1
    if variant == 'cpu':
        config.num_epochs = 16
        config.checkpoint_every_steps = 468
        config.optimizer.drop_at = (0.5, 0.75, 0.9)
    elif variant == 'trial':
        config.num_epochs = None
        config.num_steps = 900
        config.batch_size = 64
        config.log_every_steps = 10
        config.eval_every_steps = 100
        config.checkpoint_every_steps = 300
        config.dataset.train_split = 'train[:5000]'
        config.dataset.eval_split = 'test[:1000]'
        config.optimizer.drop_at = (0.6, 0.85)
    return config
