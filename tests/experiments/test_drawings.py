"""Figures of docs/ that are drawn from its tables, or from the networks."""

from experiments import drawings, held_out


def test_every_figure_is_drawn_from_what_is_committed(tmp_path, capsys):
    drawings.run(['drawings', f'--workdir={tmp_path}'])
    names = {*drawings.ARMS, 'diversity_cifar', 'gpu_steps', 'held_out', 'networks'}
    names |= {f'steps_cifar_{shortcut}' for shortcut in drawings.SHORTCUTS}
    assert {file.name for file in tmp_path.iterdir()} == {f'{name}.png' for name in names}
    assert all(file.read_bytes()[:4] == b'\x89PNG' for file in tmp_path.iterdir())
    assert '| float32, injected 1e-3 | 151 | block3_0 |' in capsys.readouterr().out


def test_a_run_whose_features_stay_equal_is_not_broken():
    equal = {'linear: stem': 0.1, 'linear: block': 0.1, 'stem': 0.0, 'block': 0.0}
    assert not drawings.is_broken([equal, equal])
    assert drawings.is_broken([equal, equal | {'block': 1e-12}])


def test_a_table_of_onsets_is_read_whole_and_its_cifar_is_labelled():
    rows = drawings.read('held_out.csv')
    found = drawings.held_out_cases(rows)
    cases = [case for of_key in found.values() for case in of_key]
    assert {name for name, _ in found if 'CIFAR' in name} == {'CIFAR-10 (JPEG-75 copy)'}
    assert [case['scale'] for case in cases] == [row['scale'] for row in rows]
    for method in held_out.METHODS:
        errors = [held_out.error(case, method) for case in cases]
        assert errors == [row[f'error, {method}'] for row in rows]
    assert None in found['batches of 32', 'pre_relu'][1]['measured']
