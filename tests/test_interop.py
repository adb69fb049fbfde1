"""Parity with float64 results of the paper's PyTorch code (tests/golden)."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from zerojax import interop, models, optimizer, step

GOLDEN = pathlib.Path(__file__).parent / 'golden'
RELATIVE_ERROR = 1e-9


@pytest.fixture(autouse=True)
def standard_promotion():
    """Flax's BatchNorm itself mixes float64 with float32 dtypes."""
    with jax.numpy_dtype_promotion('standard'):
        yield


@pytest.fixture(params=['constnet_d10_w1', 'constnet_d10_w1_scrambled'])
def golden(request):
    with np.load(GOLDEN / f'{request.param}.npz') as arrays:
        return {name: arrays[name] for name in arrays.files}


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


@pytest.mark.parametrize('convolution', models.CONVOLUTIONS)
def test_three_updates_follow_the_reference(golden, convolution):
    """Logits, losses, every gradient, every weight and the running averages."""
    with jax.enable_x64(True):
        model = models.create('constnet', depth=10, width=1, convolution=convolution)
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
        # PyTorch's running variance is the unbiased one (times n / (n - 1)), so the evaluation of
        # the final state is compared with its own statistics.
        expected_stats = interop.from_reference(final, model)['batch_stats']
        logits = model.apply(
            {'params': params, 'batch_stats': expected_stats}, batch(golden, 0)[0], train=False
        )
        assert_close(logits, golden['logits/eval'], 'logits in evaluation mode')


def test_running_variance_differs_from_the_reference_by_n_over_n_minus_1(golden):
    with jax.enable_x64(True):
        model = models.create('constnet', depth=10, width=1)
        variables = interop.from_reference(part(golden, 'init/'), model)
        images, _ = batch(golden, 0)
        _, updated = model.apply(variables, images, train=True, mutable=['batch_stats'])
        path = ('block1_0', 'bn', 'var')
        before, after = (
            tree['batch_stats'][path[0]][path[1]][path[2]] for tree in (variables, updated)
        )
        _, state = model.apply(
            variables,
            images,
            train=False,
            mutable=['intermediates'],
            capture_intermediates=lambda module, _: module.name == 'stem',
        )
        (stem,) = state['intermediates']['stem']['__call__']
        biased = np.var(np.asarray(stem), axis=(0, 1, 2))
        np.testing.assert_allclose(after, 0.9 * before + 0.1 * biased, rtol=1e-12)


def test_initial_weights_are_exactly_the_reference(golden):
    if np.unique(golden['init/conv1.weight']).size > 2:  # scrambled: not an initialisation
        return
    with jax.enable_x64(True):
        model = models.create('constnet', depth=10, width=1)
        variables = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False)
        expected = part(golden, 'init/')
        for name, array in interop.to_reference(variables).items():
            # Flax initialises in float32 unless told otherwise: 1/3 is rounded to it.
            np.testing.assert_array_equal(array, expected[name].astype(array.dtype), name)


def test_to_reference_undoes_from_reference(golden):
    with jax.enable_x64(True):
        model = models.create('constnet', depth=10, width=1)
        arrays = part(golden, 'init/')
        returned = interop.to_reference(interop.from_reference(arrays, model))
        for name, array in returned.items():
            np.testing.assert_array_equal(array, arrays[name])
        unused = {name for name in arrays if name not in returned}
        assert all('scale' in name or 'biases' in name for name in unused)


def test_a_missing_or_misshapen_array_is_named(golden):
    arrays = part(golden, 'init/')
    model = models.create('constnet', depth=10, width=1)
    with pytest.raises(ValueError, match=r'conv1\.weight: missing'):
        interop.from_reference({k: x for k, x in arrays.items() if k != 'conv1.weight'}, model)
    with pytest.raises(ValueError, match=r'conv_res\.weight: missing'):
        interop.from_reference(arrays, models.create('constnet', depth=10, width=2))
    with pytest.raises(ValueError, match=r'fc\.bias: 10 classes'):
        interop.from_reference(arrays, models.create('constnet', depth=10, width=1, num_classes=5))
