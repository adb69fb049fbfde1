import os

# Two virtual CPU devices: code that silently assumes one would show.
os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=2'
os.environ['TF_CPP_MIN_LOG_LEVEL'] = '3'

import jax
import pytest
from ml_collections import ConfigDict

from zerojax.config import default_config

jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_numpy_dtype_promotion', 'strict')
jax.config.update('jax_numpy_rank_promotion', 'raise')


@pytest.fixture
def tiny_config() -> ConfigDict:
    """ConstNet-7-1 on digits for 24 steps: the whole pipeline in a few seconds."""
    config = default_config()
    config.num_steps = 24
    config.log_every_steps = 4
    config.eval_every_steps = 8
    config.checkpoint_every_steps = 6
    config.steps_per_call = 5
    config.model.depth = 7
    config.model.width = 1
    config.model.convolution = 'patches'
    config.dataset.name = 'digits'
    config.perturbation.kind = 'gaussian'
    config.perturbation.scale = 1e-6
    return config
