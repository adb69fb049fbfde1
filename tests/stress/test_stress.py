"""The stress script at a small size."""

import gc

import jax
import pytest
import stress

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def fire(tmp_path_factory):
    return stress.Fire(tmp_path_factory.mktemp('fire'), seed=0)


def test_killed_twice(fire, capsys):
    stress.kills(fire, 2)
    assert 'kills: 2 of a run' in capsys.readouterr().out


def test_terminated(fire):
    stress.terms(fire, 1, steps=100)


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_damaged_checkpoints(fire):
    with jax.numpy_dtype_promotion('standard'):  # as a user has it
        stress.damage(fire, 2)
    gc.collect()  # reads that end after a failed one complain here, and not in the next test


def test_full_disks(fire, capsys):
    stress.disk(fire, 1)
    if 'not run' in capsys.readouterr().out:
        pytest.skip('a tmpfs may not be mounted here')


def test_a_race(fire):
    stress.races(fire, 1)


@pytest.mark.filterwarnings('ignore')  # TFDS warns of deprecations
def test_damaged_data(fire):
    with jax.numpy_dtype_promotion('standard'):
        stress.data(fire, 1, 'cifar10')


@pytest.mark.filterwarnings('ignore')
def test_odd_commands(fire):
    with jax.numpy_dtype_promotion('standard'):
        stress.configs(fire, 100)
