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


WORKS, REFUSED, OTHER_BITS = (
    'the same weights',
    'refused',
    'other weights, of which config or manifest tell',
)


@pytest.mark.parametrize(
    'variable,outcome',
    [
        ('JAX_DISABLE_JIT=1', REFUSED), ('JAX_NO_TRACING=1', REFUSED),
        ('JAX_NO_EXECUTION=1', REFUSED), ('PYTHONOPTIMIZE=1', REFUSED),
        ('FLAX_RETURN_FROZENDICT=1', WORKS), ('FLAX_PROFILE=0', WORKS), ('FLAX_LAZY_RNG=0', WORKS),
        ('TQDM_POSITION=x', WORKS), ('TQDM_MININTERVAL=x', WORKS), ('TQDM_DISABLE=1', WORKS),
        ('JAX_PLATFORMS=cuda', REFUSED), ('JAX_PLATFORMS=nonsense', REFUSED),
        ('JAX_PLATFORM_NAME=gpu', REFUSED), ('JAX_PLATFORMS=cpu', WORKS),
        ('JAX_TRANSFER_GUARD=disallow', REFUSED),
        ('JAX_TRANSFER_GUARD=disallow_explicit', REFUSED),
        ('XLA_FLAGS=--nonsense', REFUSED), ('XLA_FLAGS=--xla_nonsense=1 --xla_dump_to=', REFUSED),
        ('XLA_FLAGS=nonsense', REFUSED), ('XLA_FLAGS=--xla_backend_optimization_level=x', REFUSED),
        ('XLA_FLAGS=--xla_backend_optimization_level=0', OTHER_BITS),
        ('XLA_FLAGS=--xla_force_host_platform_device_count=2', WORKS),
        ('JAX_ENABLE_X64=maybe', REFUSED), ('JAX_ENABLE_X64=1', WORKS),
        ('JAX_DEFAULT_MATMUL_PRECISION=nonsense', REFUSED),
        ('JAX_DEFAULT_MATMUL_PRECISION=highest', WORKS),
        ('JAX_DEFAULT_MATMUL_PRECISION=bfloat16', WORKS),
        ('JAX_DEBUG_NANS=1', WORKS), ('JAX_DEBUG_INFS=1', WORKS),
        ('JAX_CHECK_TRACER_LEAKS=1', WORKS), ('JAX_DEBUG_KEY_REUSE=1', WORKS),
        ('JAX_ENABLE_CHECKS=1', WORKS), ('JAX_LOG_COMPILES=1', WORKS),
        ('JAX_EXPLAIN_CACHE_MISSES=1', WORKS), ('JAX_TRACEBACK_FILTERING=off', WORKS),
        ('JAX_NUMPY_RANK_PROMOTION=raise', WORKS), ('JAX_NUMPY_DTYPE_PROMOTION=strict', WORKS),
        ('JAX_TRANSFER_GUARD=log', WORKS), ('JAX_NUM_CPU_DEVICES=3', WORKS),
        ('JAX_CPU_ENABLE_ASYNC_DISPATCH=0', WORKS),
        ('JAX_COMPILATION_CACHE_DIR=/proc/none', WORKS),
        ('JAX_THREEFRY_PARTITIONABLE=0', OTHER_BITS), ('JAX_DEFAULT_PRNG_IMPL=rbg', OTHER_BITS),
        ('JAX_RANDOM_SEED_OFFSET=3', OTHER_BITS),
        ('JAX_DISABLE_MOST_OPTIMIZATIONS=1', OTHER_BITS),
    ],
)  # fmt: skip
def test_a_variable_changes_nothing_unseen(undisturbed, tmp_path, variable, outcome):
    name, _, value = variable.partition('=')
    workdir = tmp_path / 'run'
    done = shell(f'python -m zerojax.main {TOY} --workdir={workdir}', **{name: value})
    if outcome == REFUSED:
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith('error: ') and done.stderr.count('\n') == 1, done.stderr
        assert name.lower() in done.stderr.lower()
        assert not workdir.exists()
        return
    assert done.returncode == 0, done.stderr
    if outcome == WORKS:
        whole(workdir, undisturbed)
        return
    assert files(workdir) == files(undisturbed)
    settings, usual = (
        json.loads((folder / 'manifest.json').read_text())['settings']
        for folder in (workdir, undisturbed)
    )
    assert settings != usual
    resumed = shell(f'python -m zerojax.main {TOY} --workdir={workdir}')
    assert resumed.returncode == 2
    assert f'was started with {name}=' in resumed.stderr
