"""Runs of any precision: everything that a config may ask for works in each, and draws alike."""

import contextlib
import functools
import shutil

import jax
import jax.numpy as jnp
import pytest
import quick
from jax.extend.core import jaxprs_in_params

from zerojax import perturb
from zerojax.run import building, checks, data, program
from zerojax.run.train import train
from zerojax.step import batch
from zerojax.step.precision import numbers_of

NETWORKS = {
    'mlp': {'name': 'mlp', 'init': 'random', 'width': 8},
    'constnet': {'dropout': 0.1},
    'constnet, stem': {'dropout': 0.1, 'dropout_at': 'stem', 'shortcut': 'pre_relu'},
    'he': {'init': 'he', 'convolution': 'direct'},
    'delta_orthogonal': {'init': 'delta_orthogonal'},
    'hadamard': {'init': 'hadamard'},
    'random': {'init': 'random'},
    'leakynet': {'name': 'leakynet', 'init': '1_h_k_a', 'dropout': 0.1},
    'wideresnet': {'name': 'wideresnet', 'init': 'he', 'depth': 10, 'dropout': 0.1},
    'fixup': {'name': 'wideresnet', 'init': 'fixup', 'depth': 10, 'dropout': 0.1},
    'in bfloat16': {'dtype': 'bfloat16', 'dropout': 0.1},
    'patches': {'convolution': 'patches'},
    'mixed': {'convolution': 'mixed', 'dropout': 0.1},
    'mixed in bfloat16': {'convolution': 'mixed', 'dtype': 'bfloat16'},
}
PERTURBATIONS = {
    'none': {'scale': 0.0},
    'gaussian': {'every': 1, 'relative': True},
    'one_weight': {'every': 1},
    'ulp': {'scale': 0.0, 'count': 3},
    'unequal_init': {'count': 3},
    'gradient': {},
    'order': {'scale': 0.0},
    'activation': {},
    'activation, backward': {'backward': True},
    'dropout': {},
    'disout': {},
}
FIELDS = (
    [{'model': network} for network in NETWORKS.values()]
    + [
        {'perturbation': {'kind': kind.split(',')[0], 'scale': 0.1, **more}, 'model': network}
        for kind, more in PERTURBATIONS.items()
        for network in (NETWORKS['mlp'], NETWORKS['constnet'])
        if kind.split(',')[0] in perturb.LAYER_KINDS or network is NETWORKS['mlp']
    ]
    + [{'dataset': {'augment': True}}, {'dataset': {'cutout': 3}}, {'dataset': {'mixup': 0.5}}]
    + [{'optimizer': {'name': 'radam', 'momentum': 0.9}}, {'optimizer': {'nesterov': True}}]
    + [{'optimizer': {'freeze': 'stem'}}, {'symmetry': {'project': True}}]
)
ALL_AT_ONCE = {
    'dataset': {'augment': True, 'cutout': 3, 'mixup': 0.5},
    'perturbation': {'kind': 'gaussian', 'scale': 0.1, 'every': 1},
}


@pytest.fixture(autouse=True)
def standard_promotion():
    """Flax's BatchNorm and optax's schedule mix dtypes."""
    with jax.numpy_dtype_promotion('standard'):
        yield


@functools.cache
def digits():
    return data.load('digits', None, 'train', 'test')


@contextlib.contextmanager
def made(config, dtype, fields):
    """The config's program, and a function without arguments that makes its first state."""
    config.param_dtype = dtype
    config.perturbation.kind, config.perturbation.scale = 'none', 0.0
    with config.ignore_type():
        for group, values in fields.items():
            config[group].update(values)
    with numbers_of(dtype):
        config = checks.resolve(config, digits())
        built = program.Program(config, digits())
        scalars = building.scalars_of(config)
        new = functools.partial(
            building.new_state, config, built.model, digits().image_shape, scalars
        )
        yield built, new, scalars


def source_of(built, state, scalars):
    examples = building.examples_of(built.dataset.train)
    order = batch.epoch_order(state.keys['order'], jnp.int32(0), len(examples['label']))
    return building.Source(jax.tree.map(jnp.asarray, examples), order, scalars)


def dtypes(tree):
    return jax.tree.map(lambda x: x.dtype, tree)


def text(fields):
    return ' '.join(f'{k}={v}' for values in fields.values() for k, v in values.items())


def primitives(jaxpr):
    """All equations of a jaxpr, those of its inner ones too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from primitives(inner)


@pytest.mark.slow
@pytest.mark.parametrize('fields', FIELDS, ids=text)
@pytest.mark.parametrize('dtype', ['bfloat16', 'float64'])
def test_a_step_can_be_traced_keeps_its_dtypes_and_draws_nothing_of_64_bits(
    tiny_config, dtype, fields
):
    """What is drawn in 64 bits is not what a run of another precision draws from the same key."""
    with made(tiny_config, dtype, fields) as (built, new, scalars):

        def one_step():
            state = new()
            return state, built.one_step(state, source_of(built, state, scalars))[0]

        jaxpr, (before, after) = jax.make_jaxpr(one_step, return_shape=True)()
        assert dtypes(before) == dtypes(after)
        assert {str(x) for x in jax.tree.leaves(dtypes(after.params))} == {dtype}
        least = 'float64' if dtype == 'float64' else 'float32'
        assert {str(x) for x in jax.tree.leaves(dtypes(after.batch_stats))} <= {least}
        for equation in primitives(jaxpr.jaxpr):
            if equation.primitive.name == 'random_bits':
                assert equation.params['bit_width'] <= 32, equation.source_info
            if equation.primitive.name == 'random_gamma':
                assert equation.outvars[0].aval.dtype == jnp.float32


def test_every_kind_is_among_those_traced():
    assert set(perturb.KINDS) == {each.split(',')[0] for each in PERTURBATIONS}


@pytest.mark.slow
@pytest.mark.parametrize('name', ['mlp', 'constnet', 'leakynet', 'wideresnet', 'fixup'])
@pytest.mark.parametrize('dtype', ['bfloat16', 'float64'])
def test_two_steps_with_all_at_once_end_in_finite_weights(tiny_config, dtype, name):
    fields = ALL_AT_ONCE | {'model': NETWORKS[name]}
    with made(tiny_config, dtype, fields) as (built, new, scalars):
        state = quick.jit(new)()
        source = source_of(built, state, scalars)
        step = quick.jit(built.one_step)
        for _ in range(2):
            state, metrics = step(state, source)
        assert int(state.nonfinite_at_step) == -1
        assert jnp.isfinite(metrics['loss'])


@pytest.fixture
def small_config(tiny_config):
    """With something drawn at each step."""
    with tiny_config.ignore_type():
        tiny_config.model.update({'name': 'mlp', 'init': 'random', 'width': 8})
    tiny_config.num_steps = 12
    tiny_config.dataset.mixup = 0.5
    tiny_config.dataset.augment = True
    return tiny_config


@contextlib.contextmanager
def process_wide(x64):
    before = jax.config.jax_enable_x64
    jax.config.update('jax_enable_x64', x64)
    yield
    assert jax.config.jax_enable_x64 == x64, 'left as it was'
    jax.config.update('jax_enable_x64', before)


@pytest.mark.slow
@pytest.mark.parametrize('dtype', ['float32', 'float64'])
def test_the_mode_that_a_run_is_started_in_changes_nothing(small_config, tmp_path, dtype):
    small_config.param_dtype = dtype
    expected = train(small_config, tmp_path / 'plain')['params_sha256']
    for outside, x64 in ((process_wide, True), (jax.enable_x64, dtype == 'float32')):
        workdir = tmp_path / outside.__name__
        with outside(x64):
            assert train(small_config, workdir)['params_sha256'] == expected
            shutil.rmtree(workdir / 'checkpoints' / '12')  # and resumes from the one before
            assert train(small_config, workdir)['params_sha256'] == expected
            assert jax.config.jax_enable_x64 == x64
        assert not jax.config.jax_enable_x64
