import atexit
import os
import shutil
import signal
import tempfile

# Two virtual CPU devices: code that silently assumes one would show.
os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=2'
os.environ['TF_CPP_MIN_LOG_LEVEL'] = '3'
# Many tests, the workers of pytest-xdist and the processes they start compile the same programs.
if 'PYTEST_XDIST_WORKER' not in os.environ:
    CACHE = tempfile.mkdtemp(prefix='zerojax_tests_')
    atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
    os.environ['JAX_COMPILATION_CACHE_DIR'] = CACHE
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.1'

import jax
import pytest
from ml_collections import ConfigDict

from zerojax.config import default_config

jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_numpy_dtype_promotion', 'strict')
jax.config.update('jax_numpy_rank_promotion', 'raise')


@pytest.fixture(autouse=True)
def signal_handlers():
    """Those of pytest come back after a command that was called in its process."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


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
