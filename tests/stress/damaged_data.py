"""Prepared sets that are damaged, half prepared, or were never right."""

import io
import json
import pathlib
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

from fire import (
    ROOT,
    Fire,
    check_refusal,
    cut_in_half,
    emptied,
    flags,
    in_this_process,
    one_bit_turned,
)


def prepare_tiny_sets(folder: pathlib.Path, *names: str) -> None:
    script = ROOT / 'tests' / 'run' / 'make_tiny_tfds.py'
    command = [sys.executable, str(script), str(folder), *names]
    subprocess.run(command, check=True, capture_output=True)


def rewrite(file: pathlib.Path, change: Callable[[list[Any]], Any]) -> None:
    """Writes an array_record file anew, with intact checksums, after a change of its examples."""
    from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    reader = ArrayRecordReader(str(file))
    records = [tf_example_pb2.Example.FromString(each) for each in reader.read_all()]
    reader.close()
    change(records)
    writer = ArrayRecordWriter(str(file), 'group_size:1')
    for record in records:
        writer.write(record.SerializeToString())
    writer.close()


def with_label(label: int) -> Callable[[list[Any]], Any]:
    return lambda records: (
        records[3].features.feature['label'].int64_list.value.__setitem__(0, label)
    )


def with_small_image(records: list[Any]) -> None:
    from PIL import Image

    png = io.BytesIO()
    Image.new('RGB', (1, 1)).save(png, 'png')
    records[3].features.feature['image'].bytes_list.value[0] = png.getvalue()


def half_prepared(folder: pathlib.Path) -> None:
    """As TFDS leaves it when it is killed: a folder beside, without the descriptions."""
    folder.rename(folder.with_name(f'incomplete.GAWX1N_{folder.name}'))
    for file in folder.parent.glob('incomplete*/*.json'):
        file.unlink()


def data(fire: Fire, bits: int, *names: str) -> None:
    """Damage of every file of prepared sets, and sets that were never right."""
    whole, copy = fire.new_folder('sets'), fire.workdir / 'damaged_sets'
    prepare_tiny_sets(whole, *names)

    def train(name: str, root: pathlib.Path) -> Any:
        """What the manifest says of the data; None if it was refused."""
        workdir = fire.new_folder('trained')
        held_out = 'validation' if 'imagenet' in name else 'test'
        status, error = in_this_process([
            'main', *flags(1), f'--workdir={workdir}', f'--config.dataset.name={name}',
            f'--config.dataset.data_dir={root}', f'--config.dataset.eval_split={held_out}',
            '--config.batch_size=8', '--config.model.width=4',
        ])  # fmt: skip
        if status == 0:
            return json.loads((workdir / 'manifest.json').read_text())['dataset']
        check_refusal(status, error)
        assert not workdir.exists()
        assert f'{root}' in error, error
        return None

    intact = {name: train(name, whole) for name in names}
    assert None not in intact.values()

    def refused(name: str, change: Callable[[pathlib.Path], Any], path: pathlib.Path) -> bool:
        """Whether the set is refused once a file or folder of it was changed."""
        shutil.copytree(whole, fire.new_folder(copy.name))
        change(copy / path)
        found = train(name, copy)
        assert found in (None, intact[name]), (change, path)
        return found is None

    def damage_file(change: Callable[[bytes, random.Random], bytes]) -> Callable[..., Any]:
        return lambda file: file.write_bytes(change(file.read_bytes(), fire.random))

    def damage_archives(folder: pathlib.Path) -> None:
        shutil.rmtree(folder)
        manual = copy / 'downloads' / 'manual'
        manual.mkdir(parents=True)
        for archive in ('cifar-10-binary.tar.gz', 'Imagenet32_train_npz.zip'):
            (manual / archive).write_bytes(b'half of it')

    file_changes = [pathlib.Path.unlink, *map(damage_file, (emptied, cut_in_half))]
    file_changes += [damage_file(one_bit_turned)] * bits
    record_changes = [
        with_label(-1), with_label(1000), with_label(2**32 + 3), with_small_image,
        lambda records: records.pop(), lambda records: records.append(records[0]),
        lambda records: records.clear(),
    ]  # fmt: skip
    results = []
    # A machine with a network and TensorFlow would go on to download the set.
    with mock.patch('zerojax.run.data._why_unreachable', lambda url, timeout: 'not asked'):
        for name in names:
            files = sorted(
                x.relative_to(whole) for x in (whole / name.split('/')[0]).rglob('*') if x.is_file()
            )
            for file in files:
                of_file = [refused(name, change, file) for change in file_changes]
                assert all(of_file[:3]) or 'array_record' not in file.name, file
                results += of_file
            (train_file,) = (x for x in files if '-train.' in x.name)
            never_right = [
                *[refused(name, lambda f, c=c: rewrite(f, c), train_file) for c in record_changes],
                *[
                    refused(name, change, train_file.parent)
                    for change in (half_prepared, shutil.rmtree, damage_archives)
                ],
            ]
            assert all(never_right), never_right
            results += never_right
    print(
        f'data: {len(results)} cases; {sum(results)} were refused, {len(results) - sum(results)} '
        'trained on data of the same hash'
    )
