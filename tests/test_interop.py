"""Parity with float64 results of the paper's PyTorch code (tests/golden)."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from zerojax import interop, models, step
from zerojax.models import convolutions
from zerojax.step import optimizer

GOLDEN = pathlib.Path(__file__).parent / 'golden'
RELATIVE_ERROR = 1e-9
MODELS = {
    'constnet_d10_w1': {'name': 'constnet', 'depth': 10, 'width': 1},
    'leakynet_1_ii_i1_11': {
        'name': 'leakynet', 'depth': 10, 'width': 1, 'init': '1_ii_i1_11', 'negative_slope': 0.01,
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def standard_promotion():
    """Flax's BatchNorm itself mixes float64 with float32 dtypes."""
    with jax.numpy_dtype_promotion('standard'):
        yield


@pytest.fixture(params=[name + scrambled for name in MODELS for scrambled in ('', '_scrambled')])
def golden(request):
    with np.load(GOLDEN / f'{request.param}.npz') as arrays:
        golden = {name: arrays[name] for name in arrays.files}
    return golden | {'model': MODELS[request.param.removesuffix('_scrambled')]}


def create(golden, **arguments):
    return models.create(**(golden['model'] | arguments))


def part(golden, prefix):
    return {k.removeprefix(prefix): x for k, x in golden.items() if k.startswith(prefix)}


def assert_close(actual, expected, what):
    scale = np.abs(expected).max()
    error = np.abs(np.asarray(actual) - expected).max()
    assert error <= RELATIVE_ERROR * scale, f'{what}: error {error} at scale {scale}'


def batch(golden, k):
    return jnp.asarray(golden[f'x/{k}'].transpose(0, 2, 3, 1).astype(np.float64)), jnp.asarray(
        golden[f'y/{k}']
    )


def numbers_in_a_channel(golden, name):
    """Batch times space of what a BatchNorm of the reference reads ('block2.layer.0.bn...')."""
    stage, layer = int(name[5]), int(name[13])
    before_the_stride = golden['model']['name'] == 'constnet' and layer == 0 and stage > 1
    side = 32 // 2 ** (stage - 1 - before_the_stride)
    return 8 * side**2


@pytest.mark.parametrize('convolution', convolutions.CONVOLUTIONS)
def test_three_updates_follow_the_reference(golden, convolution):
    """Logits, losses, every gradient, every weight and the running averages."""
    with jax.enable_x64(True):
        model = create(golden, convolution=convolution)
        variables = interop.from_reference(part(golden, 'init/'), model)
        params, batch_stats = variables['params'], variables['batch_stats']
        tx = optimizer.sgd(optimizer.step_schedule(0.03, 3, (), 0.2), 0.9, False, 5e-4)
        opt_state = tx.init(params)

        @jax.jit
        def loss_and_grads(params, batch_stats, images, labels):
            def loss_function(params):
                logits, updated = model.apply(
                    {'params': params, 'batch_stats': batch_stats},
                    images,
                    train=True,
                    mutable=['batch_stats'],
                )
                loss = jnp.mean(step.cross_entropy(logits, labels))
                return loss, (logits, updated['batch_stats'])

            return jax.value_and_grad(loss_function, has_aux=True)(params)

        for k in range(3):
            (loss, (logits, batch_stats)), grads = loss_and_grads(
                params, batch_stats, *batch(golden, k)
            )
            assert logits.dtype == jnp.float64
            assert_close(logits, golden[f'logits/{k}'], f'logits {k}')
            assert_close(loss, golden[f'loss/{k}'], f'loss {k}')
            if k == 0:
                ours = interop.to_reference({'params': grads})
                expected = part(golden, 'grad0/')
                assert ours.keys() == expected.keys()
                for name, grad in expected.items():
                    assert_close(ours[name], grad, f'gradient of {name}')
            updates, opt_state = tx.update(grads, opt_state, params)
            params = optax.apply_updates(params, updates)

        final = part(golden, 'final/')
        for name, array in interop.to_reference({'params': params}).items():
            assert_close(array, final[name], name)
        for name, array in interop.to_reference({'batch_stats': batch_stats}).items():
            if name.endswith('running_mean'):
                assert_close(array, final[name], name)
            else:  # PyTorch's is the unbiased variance: n / (n - 1) times what each batch adds
                kept = 0.9**3 * golden['init/' + name]
                n = numbers_in_a_channel(golden, name)
                assert_close(kept + (array - kept) * n / (n - 1), final[name], name)
        # Evaluated with the reference's own statistics, because of that factor.
        expected_stats = interop.from_reference(final, model)['batch_stats']
        logits = model.apply(
            {'params': params, 'batch_stats': expected_stats}, batch(golden, 0)[0], train=False
        )
        assert_close(logits, golden['logits/eval'], 'logits in evaluation mode')


@pytest.mark.parametrize('name', MODELS)
def test_initial_weights_are_exactly_the_reference(name):
    with np.load(GOLDEN / f'{name}.npz') as arrays:
        expected = part(dict(arrays), 'init/')
    with jax.enable_x64(True):
        model = models.create(**MODELS[name])
        variables = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False)
        for name, array in interop.to_reference(variables).items():
            # The networks initialise in float32: 1/3 is rounded to it.
            np.testing.assert_array_equal(array, expected[name].astype(array.dtype), name)


def test_to_reference_undoes_from_reference(golden):
    with jax.enable_x64(True):
        model = create(golden)
        arrays = part(golden, 'init/')
        returned = interop.to_reference(interop.from_reference(arrays, model))
        for name, array in returned.items():
            np.testing.assert_array_equal(array, arrays[name])
        unused = {name for name in arrays if name not in returned}
        assert all(re.search(r'scale|biases|layer\.0\.bn', name) for name in unused)


def test_a_missing_or_misshapen_array_is_named(golden):
    arrays = part(golden, 'init/')
    with pytest.raises(ValueError, match=r'conv1\.weight: missing'):
        without = {k: x for k, x in arrays.items() if k != 'conv1.weight'}
        interop.from_reference(without, create(golden))
    with pytest.raises(ValueError, match=r'(conv_res\.weight: missing|16 features where .* 32)'):
        interop.from_reference(arrays, create(golden, width=2))
    with pytest.raises(ValueError, match=r'fc\.(bias|weight): 10 classes'):
        interop.from_reference(arrays, create(golden, num_classes=5))
    with pytest.raises(ValueError, match=r'^MLP: not a network of'):
        interop.from_reference(arrays, models.create('mlp'))


@pytest.mark.parametrize(
    'name,shape,message',
    [
        ('conv1.weight', (16, 1, 5, 5), '5 taps a side where the model has 3'),
        ('block1.layer.0.conv.weight', (16, 16, 3, 1), '1 taps a side where the model has 3'),
        ('block2.layer.0.conv_res.weight', (32, 16, 3, 3), '3 taps a side where the model has 1'),
        ('fc.weight', (7, 64), '7 classes where the model has 10'),
    ],
)
def test_sizes_that_are_no_features_are_checked_too(golden, name, shape, message):
    arrays = part(golden, 'init/')
    if name not in arrays:
        pytest.skip('LeakyNet has no shortcut')
    arrays[name] = np.zeros(shape)
    with pytest.raises(ValueError, match=f'^{name}: {message}'):
        interop.from_reference(arrays, create(golden))


def test_the_references_own_arrays_are_unused_where_it_does_not_use_them(golden):
    model = create(golden)
    for part_of in ('init/', 'final/'):
        arrays = part(golden, part_of)
        interop.check_unused(arrays, model)
        counters = {
            k.replace('running_mean', 'num_batches_tracked'): np.array(391)
            for k in arrays
            if k.endswith('running_mean')
        }
        interop.check_unused(arrays | counters, model)


def test_whatever_the_network_has_no_place_for_is_refused(golden):
    """Each array that only a deeper network, another network or another variant has."""
    model, arrays = create(golden), part(golden, 'final/')
    used = interop.to_reference(interop.from_reference(arrays, model))
    deeper = interop.unused_in_reference(models.create('constnet', depth=16, width=1))
    for name in (*deeper, 'block4.layer.0.scale', 'fc2.weight', 'scale', ''):
        if name not in arrays and 'num_batches' not in name:
            with pytest.raises(ValueError, match=f'^{re.escape(name)}: a .* has no such array'):
                interop.check_unused(arrays | {name: np.zeros(1)}, model)
    statistics_or_numbers = r'(scale|biases\.\d|running_(mean|var))$'
    for name in arrays.keys() - used.keys():
        if re.search(statistics_or_numbers, name):
            moved = np.array(arrays[name])
            moved.flat[-1] += 1e-12
            with pytest.raises(ValueError, match=f'^{re.escape(name)}: holds '):
                interop.check_unused(arrays | {name: moved}, model)


def test_another_depth_is_told(golden):
    arrays = part(golden, 'final/')
    init = {'init': '1_iii_iii_iii'} if golden['model']['name'] == 'leakynet' else {}
    with pytest.raises(ValueError, match=r'missing among the arrays; .* may be 10$'):
        interop.from_reference(arrays, create(golden, depth=13, **init))
    init = {'init': '1_i_i_i'} if golden['model']['name'] == 'leakynet' else {}
    with pytest.raises(ValueError, match=r'depth 7 has no such array; .* may be 10$'):
        interop.check_unused(arrays, create(golden, depth=7, **init))
