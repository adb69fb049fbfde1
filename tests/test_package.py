import importlib
import subprocess
import sys

import pytest

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


def test_public_modules_are_those_that_may_be_imported_from_the_front():
    """By their `__all__`, and by `from zerojax import NAME`, which tools that read code see too."""
    for name in zerojax.__all__:
        module = getattr(zerojax, name)
        assert module is importlib.import_module(module.__name__)
        assert module.__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'flags'"):
        zerojax.flags  # noqa: B018


@pytest.mark.parametrize('module', zerojax.__all__)
def test_every_public_name_exists_and_what_can_be_called_says_what_it_does(module):
    public = getattr(zerojax, module)
    assert public.__all__
    for name in public.__all__:
        value = getattr(public, name)
        if callable(value):
            own = value.__doc__ and not value.__doc__.startswith(f'{name}(')  # of a dataclass
            assert own, f'{module}.{name}'
