"""Prepares a tiny CIFAR-10 of random images in the folder that is the first argument."""

import io
import sys

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image


def examples(split: str, count: int):
    for i in range(count):
        pixels = np.random.default_rng([split == 'train', i]).integers(
            0, 256, (32, 32, 3), np.uint8
        )
        png = io.BytesIO()
        Image.fromarray(pixels).save(png, 'png')
        png.seek(0)
        yield f'{split}_{i}', {'id': f'{split}_{i}', 'image': png, 'label': i % 10}


if __name__ == '__main__':
    builder = tfds.builder('cifar10', data_dir=sys.argv[1], file_format='array_record')
    sizes = {'train': 40, 'test': 20}
    type(builder)._split_generators = lambda self, _: {
        split: examples(split, count) for split, count in sizes.items()
    }
    builder.download_and_prepare()
    assert 'tensorflow' not in sys.modules
