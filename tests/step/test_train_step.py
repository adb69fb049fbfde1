import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quick
from flax.traverse_util import flatten_dict, unflatten_dict
from small_step import SHAPE, batches, bits, broken_at_step, run, setup

from experiments import own_model
from zerojax import models, perturb, step, symmetry
from zerojax.step import optimizer
from zerojax.symmetry.trial import equations_of


@pytest.mark.parametrize(
    'convolution,shortcut,width',
    [
        ('direct', 'post_relu', 1), ('direct', 'pre_relu', 2),
        ('patches', 'post_relu', 2), ('patches', 'pre_relu', 1),
        ('mixed', 'post_relu', 1), ('mixed', 'pre_relu', 2),
    ],
)  # fmt: skip
def test_without_perturbation_features_stay_bitwise_identical(convolution, shortcut, width):
    model, _, state, train_step = setup(convolution=convolution, shortcut=shortcut, width=width)
    before = bits(state.params)
    state, metrics = run(train_step, state, 10)
    axes = model.feature_axes()
    assert bits(state.params) != before
    assert metrics['grad_norm'] > 0
    assert symmetry.is_symmetric(state.params, axes['params'])
    assert symmetry.is_symmetric(state.batch_stats, axes['batch_stats'])
    assert set(state.broken_streams) == set(
        symmetry.asymmetry_by_stream(state.params, axes['params'])
    )
    assert set(map(int, state.broken_streams.values())) == {-1}
    assert state.nonfinite_at_step == -1


# The toy compiles in a moment; disout distorts patches of an image.
TOY = {'name': 'mlp', 'width': 24, 'init': 'averaging'}


@functools.cache
def unperturbed_bits(network):
    """Of parameters and optimizer after each of 6 steps."""
    _, _, state, train_step = setup(**dict(network))
    after = []
    for batch in batches(6):
        state, _ = train_step(state, batch)
        after.append(bits((state.params, state.opt_state)))
    return after


@pytest.mark.parametrize(
    'arguments',
    [
        {'kind': 'gaussian', 'scale': 1e-6}, {'kind': 'one_weight', 'scale': 1e-3},
        {'kind': 'ulp', 'count': 500}, {'kind': 'unequal_init', 'scale': 1e-3, 'count': 2},
        {'kind': 'gradient', 'scale': 1e-6}, {'kind': 'activation', 'scale': 1e-6},
        {'kind': 'activation', 'scale': 1e-6, 'backward': True},
        {'kind': 'dropout', 'scale': 0.1}, {'kind': 'order'},
        pytest.param({'kind': 'disout', 'scale': 0.1}, marks=pytest.mark.slow),
    ],
    ids=lambda arguments: '-'.join(map(str, arguments.values())),
)  # fmt: skip
def test_a_perturbation_changes_its_step_and_not_a_bit_before(arguments):
    network = {} if arguments['kind'] == 'disout' else TOY
    at_step = 0 if arguments['kind'] == 'unequal_init' else 3
    perturbation = perturb.Perturbation(**arguments, at_step=at_step, every=0)
    _, _, state, train_step = setup(perturbation, **network)
    expected = unperturbed_bits(tuple(network.items()))
    for number, batch in enumerate(batches(6)[: at_step + 2]):
        state, _ = train_step(state, batch)
        # The state after update number at_step is the first that the perturbation can differ in.
        same = bits((state.params, state.opt_state)) == expected[number]
        assert same == (number < at_step)
    # Weights are perturbed before the gradient of that step, all else breaks those of the next.
    weights_first = arguments['kind'] in perturb.WEIGHT_KINDS
    assert broken_at_step(state) == (at_step if weights_first else at_step + 1)


@pytest.mark.parametrize('kind,scale', [('activation', 0.1), ('dropout', 0.1), ('order', 0.0)])
def test_a_perturbation_of_every_step_has_no_second_program(kind, scale):
    """In which convolutions would lose their threads; the step is the same."""
    after = []
    for every, branches in ((1, 0), (2, 1)):
        perturbation = perturb.Perturbation(kind, scale, every=every)
        assert perturbation.always_due == (every == 1)
        model, tx, state, _ = setup(**TOY)
        function = step.train_step_function(model, tx, perturbation=perturbation)
        batch = batches(1)[0]
        traced = jax.make_jaxpr(function)(state, batch)
        assert sum(str(each.primitive) == 'cond' for each in equations_of(traced.jaxpr)) == branches
        after.append(flatten_dict(quick.jit(function)(state, batch)[0].params))
    for path, x in after[0].items():
        np.testing.assert_allclose(x, after[1][path], rtol=1e-6, atol=1e-9, err_msg=str(path))


def test_broken_at_step_and_projection_know_orbits():
    """The toy with three unique features, each of them several times."""
    toy = {'name': 'mlp', 'width': 24, 'init': 'random', 'unique_features': 3}
    model, tx, state, _ = setup(**toy)
    axes = model.feature_axes()['params']
    orbits = symmetry.find_orbits(jax.device_get(state.params), axes)
    assert set(orbits.counts().values()) == {3}
    for given, broken in ((None, 0), (orbits, -1)):
        train_step = step.make_train_step(model, tx, project=given is not None, orbits=given)
        end = jax.tree.map(jnp.copy, state)
        for batch in batches(3):
            end, _ = train_step(end, batch)
        assert broken_at_step(end) == broken
        assert symmetry.is_symmetric(end.params, axes, orbits)
        assert not symmetry.is_symmetric(end.params, axes)


@pytest.mark.slow
@pytest.mark.parametrize('dtype', ['bfloat16', 'float64'])
def test_parameters_of_another_precision_train(dtype):
    """The loss and the statistics are held in float32 at least."""
    # Flax's BatchNorm mixes dtypes for that.
    with jax.enable_x64(dtype == 'float64'), jax.numpy_dtype_promotion('standard'):
        model = models.create('constnet', depth=7, width=1, convolution='patches')
        tx = optimizer.sgd(optax.constant_schedule(0.05), 0.9, False, 5e-4)
        state = step.create_state(
            model, tx, SHAPE, seed=0, perturbation_seed=0, dtype=jnp.dtype(dtype)
        )
        perturbation = perturb.Perturbation('gaussian', 1e-2, at_step=1)
        train_step = step.make_train_step(model, tx, perturbation=perturbation)
        batch = jax.tree.map(
            lambda x: x.astype(dtype) if x.dtype == jnp.float32 else x, batches(1)[0]
        )
        state, _ = train_step(state, batch)
        assert broken_at_step(state) == -1
        state, metrics = train_step(state, batch)
        assert broken_at_step(state) == 1
        assert {str(x.dtype) for x in jax.tree.leaves(state.params)} == {dtype}
        wide = 'float64' if dtype == 'float64' else 'float32'
        assert {str(x.dtype) for x in jax.tree.leaves(state.batch_stats)} == {wide}
        assert {str(x.dtype) for x in metrics.values()} == {wide}


def test_dropout_breaks_symmetry_without_any_perturbation():
    _, _, state, train_step = setup(dropout=0.1)
    state, _ = run(train_step, state, 4)
    assert 0 < broken_at_step(state) <= 3


def test_projection_removes_asymmetry_and_changes_nothing_where_there_is_none():
    perturbation = perturb.Perturbation('gaussian', 1e-2)
    model, _, state, train_step = setup(perturbation, project=True)
    state, _ = run(train_step, state, 3)
    assert symmetry.is_symmetric(state.params, model.feature_axes()['params'])
    assert symmetry.is_symmetric(state.batch_stats, model.feature_axes()['batch_stats'])
    assert set(map(int, state.broken_streams.values())) == {0}

    _, _, projected_state, projected_step = setup(project=True)
    _, _, plain_state, plain_step = setup()
    assert bits(run(projected_step, projected_state, 5)[0].params) == bits(
        run(plain_step, plain_state, 5)[0].params
    )


def test_how_steps_are_split_into_calls_does_not_change_a_bit():
    model, tx, _, _ = setup(**TOY)
    data = jax.tree.map(lambda *x: jnp.stack(x), *batches(10))
    function = step.train_step_function(
        model, tx, perturbation=perturb.Perturbation('gaussian', 1e-6)
    )
    steps = step.make_train_steps(
        lambda state, data: function(state, jax.tree.map(lambda x: x[state.step], data)),
        determinism='deterministic',
        steps_per_call=3,
    )
    ends = []
    for counts in ([1] * 10, [3, 3, 3, 1], [2, 1, 3, 2, 2]):
        state = step.create_state(model, tx, SHAPE, seed=0, perturbation_seed=0)
        for count in counts:
            state, metrics = steps(state, data, np.int32(count))
        ends.append(bits((state.params, state.batch_stats, state.opt_state, metrics)))
    assert ends[0] == ends[1] == ends[2]


def test_the_first_step_that_is_not_finite_is_remembered():
    _, _, state, train_step = setup()
    for number, batch in enumerate(batches(4)):
        if number == 2:
            batch['image'] = batch['image'].at[0].set(jnp.inf)
        state, _ = train_step(state, batch)
    assert state.nonfinite_at_step == 3


def test_the_states_buffers_are_donated():
    _, _, state, train_step = setup()
    kernel = state.params['stem']['kernel']
    train_step(state, batches(1)[0])
    assert kernel.is_deleted()


def test_one_compilation_serves_all_steps():
    traces = []
    model, tx, state, _ = setup()
    function = step.train_step_function(model, tx)

    def counted(state, batch):
        traces.append(None)
        return function(state, batch)

    jitted = jax.jit(counted)
    for batch in batches(3):
        state, _ = jitted(state, batch)
    assert len(traces) == 1


def test_a_pruned_weight_is_zero_in_the_gradient_too_whatever_the_perturbation():
    """Perturbed where everything is pruned, the loss is that without a perturbation."""
    _, _, state, _ = setup(**TOY)
    state.params['head']['kernel'] += jax.random.normal(jax.random.key(1), (24, 10))
    mask = jax.tree.map(lambda x: jnp.ones(x.shape, bool), state.params)
    mask['hidden']['kernel'] = jnp.zeros_like(mask['hidden']['kernel'])

    def loss(mask, scale):
        perturbation = perturb.Perturbation('gaussian', scale, layers='hidden/kernel')
        _, _, _, train_step = setup(perturbation, **TOY)
        start = jax.tree.map(jnp.copy, dataclasses.replace(state, mask=mask))
        end, metrics = train_step(start, batches(1)[0])
        assert mask is None or not end.params['hidden']['kernel'].any()
        return float(metrics['loss'])

    assert loss(mask, 0.0) == loss(mask, 10.0)
    assert loss(None, 0.0) != loss(None, 10.0)


@pytest.mark.parametrize('kept', ['all', 'all but one weight'])
def test_a_projection_never_brings_pruned_weights_back(kept):
    """It is refused where there is a mask, whatever is in it."""
    _, _, state, train_step = setup(project=True, **TOY)
    mask = jax.tree.map(lambda x: jnp.ones(x.shape, bool), state.params)
    if kept != 'all':
        mask['hidden']['kernel'] = mask['hidden']['kernel'].at[3, 5].set(False)
    with pytest.raises(ValueError, match='project=True: the state has a mask'):
        train_step(dataclasses.replace(state, mask=mask), batches(1)[0])


@pytest.mark.parametrize('kind', perturb.WEIGHT_KINDS)
def test_a_frozen_parameter_is_moved_by_no_perturbation_of_weights(kind):
    """One that chooses it as well perturbs the others alone."""
    model, _, state, _ = setup(**TOY)
    state.params['hidden']['bias'] += 1.0
    scale = {} if kind == 'ulp' else {'scale': 0.5}
    tx = optimizer.freeze(optimizer.sgd(optax.constant_schedule(0.0), 0.9, False, 0.1), 'hidden/k')
    perturbation = perturb.Perturbation(kind, **scale, every=1 if kind != 'unequal_init' else None)
    train_step = step.make_train_step(model, tx, perturbation=perturbation, frozen='hidden/k')
    before = jax.tree.map(np.asarray, state.params)
    state = dataclasses.replace(state, opt_state=tx.init(state.params))
    state, _ = run(train_step, state, 3)
    moved = jax.tree.map(lambda x, y: bool((x != y).any()), before, state.params)
    assert not moved['hidden']['kernel']
    assert moved['hidden']['bias']


@pytest.mark.parametrize(
    'network',
    [
        {'shortcut': 'post_relu'},
        {'shortcut': 'pre_relu', 'convolution': 'mixed'},
        {'name': 'leakynet', 'depth': 7, 'width': 1, 'init': '1_1_1_1'},
        {'name': 'mlp', 'width': 24, 'init': 'averaging'},
    ],
    ids=lambda network: network.get('name', network.get('shortcut')),
)
def test_breaking_one_stream_leaves_the_others_symmetric_to_the_bit(network):
    """Weights that no other stream indexes are noisy: symmetry breaks stream by stream."""
    model, _, state, train_step = setup(**network)
    axes = model.feature_axes()['params']
    flat_axes = flatten_dict(axes)
    own = {}  # arrays that one stream alone indexes
    for path, names in flat_axes.items():
        if len(streams := set(names) - {None}) == 1:
            own.setdefault(*streams, []).append(path)
    assert len(own) > 1 or network.get('name') == 'mlp'
    for broken, chosen in own.items():
        rng = np.random.default_rng(0)
        noisy = jax.tree.map(jnp.copy, state)  # the step takes its argument's memory
        params = flatten_dict(noisy.params)
        for path in chosen:
            noise = rng.normal(size=params[path].shape).astype(np.float32)
            params[path] = params[path] + 0.1 * noise
        noisy = dataclasses.replace(noisy, params=unflatten_dict(params))
        ended, _ = run(train_step, noisy, 8)
        found = symmetry.asymmetry_by_stream(ended.params, axes)
        assert {name for name, value in found.items() if value > 0} == {broken}
        assert ended.broken_streams == {name: 0 if name == broken else -1 for name in found}


def layer(*kernel_axes):
    return {'kernel': kernel_axes, 'bias': kernel_axes[1:]}


MIXER_AXES = {
    'embed': layer(None, 'c'), 'tokens': layer(None, None), 'up': layer('c', 'h'),
    'down': layer('h', 'c'), 'head': layer('c', None),
}  # fmt: skip


class OwnModel:
    """The mixer of `experiments.own_model` as the train step takes any model; its streams are c,
    which its skip connections carry, and h, the hidden features of its MLP."""

    def init(self, key, images, train):
        return own_model.Mixer().init(key, images[..., 0])

    def apply(self, variables, images, train, mutable, rngs):
        return own_model.Mixer().apply({'params': variables['params']}, images[..., 0]), {}

    def feature_axes(self):
        return {'params': MIXER_AXES, 'batch_stats': {}}


def test_the_streams_of_a_users_own_model_break_one_at_a_time():
    """Each when noise comes to weights that it alone indexes, the other never, or before it."""
    model, tx = OwnModel(), optimizer.sgd(optax.constant_schedule(0.1), 0.9, False, 5e-4)
    own = {'c': 'embed/.*|head/kernel', 'h': 'up/bias'}
    for noisy_at_step_2, layers in own.items():
        noise = perturb.Perturbation('gaussian', 0.1, at_step=2, layers=layers)
        train_step = step.make_train_step(model, tx, perturbation=noise)
        for noisy_before in (set(), own.keys() - {noisy_at_step_2}):
            state = step.create_state(model, tx, SHAPE, seed=0, perturbation_seed=0)
            if 'c' in noisy_before:
                state.params['embed']['bias'] += jnp.linspace(-0.1, 0.1, 32)
            if 'h' in noisy_before:
                state.params['up']['bias'] += jnp.linspace(-0.1, 0.1, 64)
            for number, batch in enumerate(batches(8)):
                state, _ = train_step(state, batch)
                found = symmetry.asymmetry_by_stream(state.params, MIXER_AXES)
                broken = noisy_before | ({noisy_at_step_2} if number >= 2 else set())
                assert {name for name, value in found.items() if value > 0} == broken
            at_step = dict.fromkeys(own, -1) | dict.fromkeys(noisy_before, 0)
            assert state.broken_streams == at_step | {noisy_at_step_2: 2}
