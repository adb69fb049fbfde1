import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zerojax.run.data import channel_statistics
from zerojax.step import batch

KEY = jax.random.key(0)


def test_an_epoch_uses_every_example_at_most_once_and_drops_only_the_rest():
    order = batch.epoch_order(KEY, jnp.int32(3), 103)
    used = np.concatenate([batch.batch_indices(order, jnp.int32(30 + n), 10) for n in range(10)])
    assert len(np.unique(used)) == 100
    assert used.min() >= 0
    assert used.max() < 103


@pytest.mark.parametrize('num_examples,batch_size', [(103, 10), (100, 10), (19, 10), (10, 10)])
def test_an_epoch_that_keeps_its_last_batch_uses_every_example_exactly_once(
    num_examples, batch_size
):
    order = batch.epoch_order(KEY, jnp.int32(3), num_examples)
    steps = batch.steps_per_epoch(num_examples, batch_size, keep_last=True)
    assert steps == np.ceil(num_examples / batch_size)
    rest = batch.last_batch_indices(order, batch_size)
    assert len(rest) == num_examples % batch_size
    whole = [
        batch.batch_indices(order, jnp.int32(2 * steps + n), batch_size, keep_last=True)
        for n in range(num_examples // batch_size)
    ]
    np.testing.assert_array_equal(np.sort(np.concatenate([*whole, rest])), np.arange(num_examples))


def test_the_order_depends_on_key_and_epoch_alone():
    first, again, next_epoch, other_key = (
        np.asarray(batch.epoch_order(key, jnp.int32(epoch), 50))
        for key, epoch in ((KEY, 0), (KEY, 0), (KEY, 1), (jax.random.key(1), 0))
    )
    np.testing.assert_array_equal(first, again)
    assert (first != next_epoch).any()
    assert (first != other_key).any()


def test_augmentation_yields_crops_of_the_reflected_image_and_mirrors_half():
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (400, 12, 12, 2)), jnp.uint8)
    images = jnp.broadcast_to(images[:1], images.shape)
    augmented = np.asarray(batch.augment(KEY, images))
    assert augmented.dtype == np.uint8
    padded = np.pad(np.asarray(images[0]), ((4, 4), (4, 4), (0, 0)), mode='reflect')
    crops = {}
    for i in range(9):
        for j in range(9):
            crop = padded[i : i + 12, j : j + 12]
            crops.setdefault(crop.tobytes(), (i, j, False))
            crops.setdefault(crop[:, ::-1].tobytes(), (i, j, True))
    seen = [crops[image.tobytes()] for image in augmented]
    assert len({(i, j) for i, j, _ in seen}) > 60
    assert 150 < sum(flip for _, _, flip in seen) < 250
    assert (np.asarray(batch.augment(KEY, images)) == augmented).all()


def test_normalization_is_in_units_of_0_to_255():
    images = np.random.default_rng(0).integers(0, 256, (50, 4, 4, 3)).astype(np.uint8)
    mean, std = channel_statistics(images)
    normalized = np.asarray(batch.normalize(jnp.asarray(images), mean, std))
    np.testing.assert_allclose(normalized.mean((0, 1, 2)), 0, atol=1e-6)
    np.testing.assert_allclose(normalized.std((0, 1, 2)), 1, rtol=1e-6)


def test_cutout_sets_one_square_to_zero():
    images = jnp.ones((500, 9, 12, 2))
    holes = np.asarray(batch.cutout(KEY, images, 4)) == 0
    assert (holes[..., 0] == holes[..., 1]).all()
    sizes = set()
    for hole in holes[..., 0]:
        rows, columns = np.flatnonzero(hole.any(1)), np.flatnonzero(hole.any(0))
        assert hole.sum() == len(rows) * len(columns), 'a rectangle'
        assert len(rows) == rows[-1] - rows[0] + 1
        sizes.add((len(rows), len(columns)))
    assert max(sizes) == (4, 4)
    assert min(sizes) == (2, 2), 'cut by the border, its centre inside the image'
    assert holes.any(0).all(), 'anywhere'


def test_mixup_mixes_images_and_labels_by_one_share():
    images = jnp.asarray(np.random.default_rng(0).normal(size=(12, 3, 3, 1)), jnp.float32)
    labels = jnp.arange(12)
    mixed, probabilities = batch.mixup(KEY, images, labels, 12, 1.0)
    share = float(probabilities.max(1).min())  # an example mixed with itself has 1
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose(
        mixed.reshape(12, 9), probabilities @ images.reshape(12, 9), atol=1e-6
    )
    distances = np.abs(np.asarray(probabilities)[..., None] - np.array([0, 1, share, 1 - share]))
    assert distances.min(-1).max() < 1e-6, 'only 0, 1, the share and its complement'
    shares = [
        float(batch.mixup(jax.random.key(i), images[:2], labels[:2], 2, 0.2)[1].max())
        for i in range(60)
    ]
    assert np.mean(np.array(shares) > 0.95) > 0.4, 'Beta(0.2, 0.2) is mostly near 0 or 1'


@pytest.mark.parametrize('name', ['order', 'augment', 'cutout', 'mixup'])
def test_64_bit_numbers_change_no_draw(name):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (64, 9, 12, 2)).astype(np.uint8), np.arange(64) % 5
    floats, labels = images.astype(np.float32), labels.astype(np.int32)
    function = {
        'order': lambda: batch.epoch_order(KEY, jnp.int32(3), 103),
        'augment': lambda: batch.augment(KEY, jnp.asarray(images)),
        'cutout': lambda: batch.cutout(KEY, jnp.asarray(floats), 4),
        'mixup': lambda: batch.mixup(KEY, jnp.asarray(floats), jnp.asarray(labels), 5, 0.7),
    }[name]
    usual = function()
    with jax.enable_x64(True):
        other = function()
    assert jax.tree.map(lambda x: x.dtype, other) == jax.tree.map(lambda x: x.dtype, usual)
    jax.tree.map(np.testing.assert_array_equal, other, usual)
