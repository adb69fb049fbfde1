import subprocess
import sys

import zerojax


def test_importing_the_package_is_light_and_takes_no_device():
    """No JAX, so no device, no global state and no time; and its modules start no backend."""
    code = (
        'import sys, time; began = time.perf_counter(); import zerojax; '
        'assert time.perf_counter() - began < 0.5; assert "jax" not in sys.modules; '
        'from zerojax import interop, train; '
        'from jax._src import xla_bridge; assert not xla_bridge.backends_are_initialized(); '
        'import jax; assert not jax.config.jax_enable_x64; '
        'assert "tensorflow" not in sys.modules'
    )
    subprocess.run([sys.executable, '-c', code], check=True)


def test_the_version_is_the_installed_one():
    from importlib.metadata import version

    assert version('zerojax') == zerojax.__version__
