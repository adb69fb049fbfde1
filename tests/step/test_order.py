"""Kind 'order': gradients whose contributions are added in a random order, and are else the same.

Compared are the gradients themselves, unless the training is what matters.
"""

import dataclasses
import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
import sklearn.datasets
import small_step
from flax.traverse_util import flatten_dict

from zerojax import step, symmetry
from zerojax.perturb import Perturbation
from zerojax.step import order
from zerojax.step.order import reordered_sums

ORDER = Perturbation('order')
KEY = jax.random.key(3)
ROUNDING = {'float32': 2.0**-24, 'float64': 2.0**-53, 'bfloat16': 2.0**-8}
KERNELS = ['first/kernel', 'head/kernel', 'second/kernel']


class Own(nn.Module):
    """A model that zerojax does not ship: Flax's own layers, examples coupled by BatchNorm."""

    normalized: bool = True

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (3, 3), name='first', param_dtype=x.dtype)(x)
        if self.normalized:
            x = nn.BatchNorm(use_running_average=False, name='norm', param_dtype=x.dtype)(x)
        x = nn.Conv(5, (3, 3), strides=2, name='second', param_dtype=x.dtype)(x)
        return nn.Dense(4, name='head', param_dtype=x.dtype)(x.mean(axis=(1, 2)))


def images(number, dtype='float32'):
    return jax.random.normal(jax.random.key(1), (number, 8, 8, 2), dtype)


def loss(model, variables, x):
    y, _ = model.apply(variables, x, mutable=['batch_stats'])
    return jnp.mean(jnp.sin(jnp.arange(y.size).reshape(y.shape).astype(y.dtype)) * y**2)


def gradients(model, variables, x, p=None, key=KEY):
    """{path: array}, ordinary or with the perturbation; of all parameters."""

    def of(params, key):
        rest = {name: each for name, each in variables.items() if name != 'params'}
        if p is None:
            return loss(model, {'params': params, **rest}, x)
        with reordered_sums(p, params, key):
            return loss(model, {'params': params, **rest}, x)

    grads = quick.jit(jax.grad(of))(variables['params'], key)
    return flatten_dict(jax.tree.map(np.asarray, grads), sep='/')


def initialized(model, x):
    return quick.jit(model.init)(jax.random.key(0), x)


@pytest.mark.parametrize('number', [32, 37, 5])
@pytest.mark.parametrize('dtype', ['float32', 'float64', 'bfloat16'])
def test_the_gradient_is_the_ordinary_one_up_to_rounding(dtype, number):
    """Batches that 16 divides, that it does not, and a smaller one."""
    with jax.enable_x64(dtype == 'float64'), jax.numpy_dtype_promotion('standard'):
        model, x = Own(), images(number, dtype)
        variables = initialized(model, x)
        ordinary = gradients(model, variables, x)
        found = gradients(model, variables, x, ORDER)
        for path, gradient in ordinary.items():
            assert found[path].dtype == gradient.dtype == dtype
            same = found[path].tobytes() == gradient.tobytes()
            assert same == (path not in KERNELS), path
            found_64, gradient_64 = (each[path].astype('float64') for each in (found, ordinary))
            error = np.linalg.norm(found_64 - gradient_64)
            assert error < 20 * ROUNDING[dtype] * np.linalg.norm(gradient_64), path


@pytest.mark.parametrize('number', [32, 37, 5])
def test_each_entry_is_within_the_rounding_of_its_additions(number):
    """The contributions of `np.array_split` groups, added up exactly, against those of a layer."""
    x = jax.random.normal(jax.random.key(1), (number, 7))
    weight = jax.random.normal(jax.random.key(2), (number, 6))
    model = nn.Dense(6, precision='highest')
    params = initialized(model, x)['params']

    def of(params):
        with reordered_sums(ORDER, params, KEY):
            return jnp.sum(model.apply({'params': params}, x) * weight)

    found = np.asarray(quick.jit(jax.grad(of))(params)['kernel'], 'float64')
    x, weight = np.asarray(x, 'float64'), np.asarray(weight, 'float64')
    terms = x[:, :, None] * weight[:, None, :]
    groups = np.array_split(np.arange(number), min(16, number))
    additions = len(groups) - 1 + len(groups[0])  # between groups, within one, and products
    error = np.abs(found - terms.sum(0))
    assert (error <= additions * ROUNDING['float32'] * np.abs(terms).sum(0)).all()
    assert error.max() > 0


@pytest.mark.parametrize('number', [1, 5, 16, 17, 32, 37])
def test_groups_are_those_of_array_split(number):
    x = np.arange(1, 2 * number + 1, dtype='float32').reshape(number, 2)
    groups = min(16, number)
    found = np.asarray(order._split(jnp.asarray(x), groups))
    expected = np.array_split(x, groups)
    assert [each[each[:, 0] > 0].tolist() for each in found] == [x.tolist() for x in expected]


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_where_additions_are_exact_no_bit_changes(dtype):
    """Sums of few small integers: as long as each example counts once, the order is all."""
    key = jax.random.key(2)
    x = jax.random.randint(key, (37, 8), -1, 2).astype(dtype)
    weight = jax.random.randint(key, (37, 6), -1, 2).astype(dtype)
    model = nn.Dense(6, param_dtype=dtype, precision='highest')
    params = initialized(model, x)['params']

    def of(params, x, ordered):
        def product(params):
            return jnp.sum(model.apply({'params': params}, x) * weight)

        if not ordered:
            return product(params)
        with reordered_sums(ORDER, params, KEY):
            return product(params)

    # The model is the layer itself, whose path is empty.
    grad = quick.jit(jax.grad(of, argnums=(0, 1)), static_argnums=2)
    expected, found = (grad(params, x, ordered) for ordered in (False, True))
    assert np.abs(np.asarray(expected[0]['kernel'], 'float32')).max() > 2
    assert small_step.bits(found) == small_step.bits(expected)


def test_each_weight_has_an_order_of_its_own_and_all_orders_are_as_likely():
    """Of three numbers whose sum shows which was added last; and of 16, each as often first."""
    number = 60_000
    bits = jax.random.bits(KEY, (order.ORDER_WORDS, number), jnp.uint32)
    tiny = 2.0**-30
    three = jnp.tile(jnp.array([1.0, -1.0, tiny])[:, None], (1, number))
    sums = np.asarray(quick.jit(order.add_in_random_order)(three, bits))
    assert set(np.unique(sums)) == {0, tiny}  # lost unless it is added last
    assert abs(np.mean(sums == tiny) - 1 / 3) < 0.01
    for place in range(16):
        others = [(place + 1) % 16, (place + 7) % 16]
        each = jnp.zeros((16, number)).at[np.array([place, *others])].set(three[::-1])
        sums = np.asarray(quick.jit(order.add_in_random_order)(each, bits))
        assert abs(np.mean(sums == tiny) - 1 / 3) < 0.01, place


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_each_sum_is_rounded(dtype):
    """Also where XLA would keep bfloat16 in float32: sums are those of one of the orders."""
    number = 2000
    values = jax.random.normal(KEY, (5,)).astype(dtype)
    bits = jax.random.bits(KEY, (order.ORDER_WORDS, number), jnp.uint32)
    tiled = jnp.tile(values[:, None], (1, number))
    found = np.unique(np.asarray(jax.jit(order.add_in_random_order)(tiled, bits)))
    sums = [functools.reduce(np.add, each) for each in itertools.permutations(np.asarray(values))]
    assert len(found) > 1
    np.testing.assert_array_equal(found, np.unique(sums))


def test_the_key_decides_every_bit():
    model, x = Own(), images(32)
    variables = initialized(model, x)
    first, again, other = (
        gradients(model, variables, x, ORDER, jax.random.key(seed)) for seed in (1, 1, 2)
    )
    for path in KERNELS:
        assert first[path].tobytes() == again[path].tobytes()
        assert first[path].tobytes() != other[path].tobytes()


def test_a_kernel_that_is_not_chosen_has_its_ordinary_gradient():
    """And one that is the same whichever others are."""
    model, x = Own(), images(32)
    variables = initialized(model, x)
    ordinary = gradients(model, variables, x)
    everywhere = gradients(model, variables, x, ORDER)
    found = gradients(model, variables, x, Perturbation('order', layers='second'))
    assert order.ordered_kernels(variables['params'], '.*') == KERNELS
    for path, gradient in found.items():
        expected = everywhere if path == 'second/kernel' else ordinary
        assert gradient.tobytes() == expected[path].tobytes(), path


class Scanned(nn.Module):
    """Layers whose kernels are slices of one array."""

    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            lambda layer, x, _: (layer(x), None),
            variable_axes={'params': 0},
            split_rngs={'params': True},
            length=2,
        )
        return layers(nn.Dense(x.shape[-1], name='dense'), x, None)[0]


class Odd(nn.Module):
    """Layers that cannot be added up by examples, each in its own way."""

    way: str

    @nn.compact
    def __call__(self, x):
        kernel = self.param('kernel', nn.initializers.ones, (x.shape[-1], 3))
        if self.way == 'statistics':
            self.variable('state', 'mean', jnp.zeros, ())
        return (x @ kernel).T if self.way == 'transposed' else x @ kernel


class Around(nn.Module):
    """One of these, called as it should or not."""

    way: str

    @nn.compact
    def __call__(self, x):
        layer = Odd(self.way, name='odd')
        return layer(x=x) if self.way == 'by name' else layer(x)


@pytest.mark.parametrize(
    'model,message',
    [
        (Scanned(), 'dense: order needs parameters as they are stored'),
        (Around('statistics'), 'odd: order needs layers of parameters'),
        (Around('transposed'), 'odd: order needs a batch first'),
        (Around('by name'), 'odd: order needs layers that are called with one array'),
    ],
    ids=['scan', 'statistics', 'transposed', 'by name'],
)  # fmt: skip
def test_layers_that_it_cannot_act_on_are_refused(model, message):
    x = jnp.ones((4, 5))
    variables = model.init(KEY, x)
    with pytest.raises(ValueError, match=message), reordered_sums(ORDER, variables['params'], KEY):
        model.apply(variables, x)


@pytest.mark.parametrize(
    'p,message',
    [
        (Perturbation('order', layers='a/bias'), "layers='a/bias': matches no kernel"),
        (ORDER, 'chooses kernels of a, which no call'),
        (Perturbation('gradient'), "kind='gradient': must be 'order'"),
    ],
)
def test_what_has_nothing_to_act_on_is_refused(p, message):
    params = {'a': {'kernel': jnp.ones((2, 2)), 'bias': jnp.ones(2)}}
    with pytest.raises(ValueError, match=message), reordered_sums(p, params, KEY):
        pass  # nothing is called


# Through the train step.


def asymmetry_of(params, axes):
    return max(float(x) for x in symmetry.asymmetry_by_stream(params, axes).values())


@functools.cache
def digits():
    found = sklearn.datasets.load_digits()
    x = (found.images[..., None] / 8 - 1).astype('float32')
    return [
        {'image': x[i : i + 64], 'label': found.target[i : i + 64].astype('int32')}
        for i in range(0, 1600, 64)
    ]


@pytest.mark.slow
def test_constnet_is_symmetric_to_its_step_and_then_trains_away():
    """Not a bit differs before; from then on the asymmetry grows, from that of a rounding."""
    model, _, ordinary, plain_step = small_step.setup()
    axes = model.feature_axes()['params']
    _, _, state, train_step = small_step.setup(Perturbation('order', at_step=5))
    for number in range(105):
        batch = digits()[number % 25]
        state, _ = train_step(state, batch)
        if number < 7:
            ordinary, _ = plain_step(ordinary, batch)
            same = small_step.bits(state.params) == small_step.bits(ordinary.params)
            assert same == (number < 5)
            assert (asymmetry_of(state.params, axes) == 0) == (number < 5)
        if number == 6:
            assert 0 < asymmetry_of(state.params, axes) < 1e-6
    assert small_step.broken_at_step(state) == 6
    assert asymmetry_of(state.params, axes) > 1e-5


def test_its_seed_and_step_decide_every_bit():
    def kernels_after_first(seed, step_number):
        _, _, state, train_step = small_step.setup(ORDER)
        keys = {**state.keys, 'perturbation': jax.random.key(seed)}
        state = dataclasses.replace(state, keys=keys, step=jnp.int32(step_number))
        state, _ = train_step(state, small_step.batches(1)[0])
        return small_step.bits(state.params)

    first = kernels_after_first(1, 0)
    assert first == kernels_after_first(1, 0)
    assert first != kernels_after_first(2, 0)
    assert first != kernels_after_first(1, 1)


def test_several_runs_at_once():
    """As a sweep batches them: the step is one number, and each run draws from its own key."""
    model, tx, state, train_step = small_step.setup(ORDER)
    one_step = step.train_step_function(model, tx, perturbation=ORDER)
    keys = jax.random.split(jax.random.key(1), 2)[jnp.array([0, 1, 0])]
    stacked = jax.tree.map(lambda x: jnp.stack([x] * 3), state)
    stacked.keys['perturbation'] = keys
    stacked = dataclasses.replace(stacked, step=state.step)
    axes = dataclasses.replace(jax.tree.map(lambda _: 0, stacked), step=None)
    both = quick.jit(jax.vmap(one_step, (axes, None), (axes, 0)))
    for batch in small_step.batches(2):
        stacked, _ = both(stacked, batch)
        state, _ = train_step(state, batch)
    runs = [jax.tree.map(lambda x, i=i: np.asarray(x[i]), stacked.params) for i in range(3)]
    assert small_step.bits(runs[0]) == small_step.bits(runs[2]) != small_step.bits(runs[1])
    for run in runs:
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), run, state.params)
    assert np.asarray(list(stacked.broken_streams.values())).max() == 1


def test_several_steps_in_one_call():
    """The same orders, up to the rounding of another program."""
    model, tx, state, train_step = small_step.setup(ORDER)
    batch = small_step.batches(1)[0]
    one_step = step.train_step_function(model, tx, perturbation=ORDER)
    many = step.make_train_steps(one_step, determinism='deterministic', steps_per_call=3)
    looped, _ = many(jax.tree.map(jnp.copy, state), batch, jnp.int32(3))
    for _ in range(3):
        state, _ = train_step(state, batch)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=1e-5), looped.params, state.params
    )
    assert small_step.broken_at_step(looped) == small_step.broken_at_step(state) == 1
