"""Variables of JAX and others: each is refused in one line, or changes nothing unseen."""

import json

import pytest
from shell import TOY, files, shell, whole

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('undisturbed') / 'run'
    assert shell(f'python -m zerojax.main {TOY} --workdir={workdir}').returncode == 0
    return workdir


def assigned(text):
    return dict(variable.split('=', 1) for variable in text.split())


@pytest.mark.parametrize(
    'variables',
    [  # each line is one run, whose variables do not touch one another
        'FLAX_RETURN_FROZENDICT=1 FLAX_PROFILE=0 FLAX_LAZY_RNG=0 TQDM_POSITION=x TQDM_MININTERVAL=x'
        ' JAX_PLATFORMS=cpu JAX_TRANSFER_GUARD=log'
        ' XLA_FLAGS=--xla_force_host_platform_device_count=2',
        'JAX_DEBUG_NANS=1 JAX_DEBUG_INFS=1 JAX_CHECK_TRACER_LEAKS=1 JAX_DEBUG_KEY_REUSE=1'
        ' JAX_ENABLE_CHECKS=1 JAX_TRACEBACK_FILTERING=off',
        'JAX_LOG_COMPILES=1 JAX_EXPLAIN_CACHE_MISSES=1 JAX_ENABLE_X64=1 TQDM_DISABLE=1'
        ' JAX_CPU_ENABLE_ASYNC_DISPATCH=0 JAX_NUM_CPU_DEVICES=3',
        'JAX_NUMPY_RANK_PROMOTION=raise JAX_NUMPY_DTYPE_PROMOTION=strict'
        ' JAX_DEFAULT_MATMUL_PRECISION=highest JAX_COMPILATION_CACHE_DIR=/proc/none',
        'JAX_DEFAULT_MATMUL_PRECISION=bfloat16',
    ],
)  # fmt: skip
def test_most_change_nothing(undisturbed, tmp_path, variables):
    workdir = tmp_path / 'run'
    done = shell(f'python -m zerojax.main {TOY} --workdir={workdir}', **assigned(variables))
    assert done.returncode == 0, done.stderr
    whole(workdir, undisturbed)


@pytest.mark.parametrize(
    'variable',
    [
        'JAX_DISABLE_JIT=1', 'JAX_NO_TRACING=1', 'JAX_NO_EXECUTION=1', 'PYTHONOPTIMIZE=1',
        'JAX_PLATFORMS=cuda', 'JAX_PLATFORMS=nonsense', 'JAX_PLATFORM_NAME=gpu',
        'JAX_TRANSFER_GUARD=disallow', 'JAX_TRANSFER_GUARD=disallow_explicit',
        'XLA_FLAGS=--nonsense', 'XLA_FLAGS=--xla_nonsense=1 --xla_dump_to=', 'XLA_FLAGS=nonsense',
        'XLA_FLAGS=--xla_backend_optimization_level=x', 'JAX_ENABLE_X64=maybe',
        'JAX_DEFAULT_MATMUL_PRECISION=nonsense',
    ],
)  # fmt: skip
def test_one_that_leaves_no_way_to_train_is_refused(tmp_path, variable):
    name, _, value = variable.partition('=')
    workdir = tmp_path / 'run'
    done = shell(f'python -m zerojax.main {TOY} --workdir={workdir}', **{name: value})
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith('error: ') and done.stderr.count('\n') == 1, done.stderr
    assert name.lower() in done.stderr.lower()
    assert not workdir.exists()


@pytest.mark.parametrize(
    'variable',
    [
        'XLA_FLAGS=--xla_backend_optimization_level=0', 'JAX_THREEFRY_PARTITIONABLE=0',
        'JAX_DEFAULT_PRNG_IMPL=rbg', 'JAX_RANDOM_SEED_OFFSET=3',
        'JAX_DISABLE_MOST_OPTIMIZATIONS=1',
    ],
)  # fmt: skip
def test_one_that_changes_the_bits_is_recorded_and_missed(undisturbed, tmp_path, variable):
    """The manifest tells of it, and the run goes on only with it."""
    workdir = tmp_path / 'run'
    done = shell(f'python -m zerojax.main {TOY} --workdir={workdir}', **assigned(variable))
    assert done.returncode == 0, done.stderr
    assert files(workdir) == files(undisturbed)
    settings, usual = (
        json.loads((folder / 'manifest.json').read_text())['settings']
        for folder in (workdir, undisturbed)
    )
    assert settings != usual
    resumed = shell(f'python -m zerojax.main {TOY} --workdir={workdir}')
    assert resumed.returncode == 2
    assert f'was started with {variable.split("=")[0]}=' in resumed.stderr
