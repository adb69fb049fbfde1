"""Figures of docs/ that are drawn from its tables, or from the networks."""

from experiments import drawings


def test_every_figure_is_drawn_from_what_is_committed(tmp_path, capsys):
    drawings.run(['drawings', f'--workdir={tmp_path}'])
    names = {*drawings.ARMS, 'diversity_cifar', 'gpu_steps', 'networks', 'steps_cifar_post_relu'}
    assert {file.name for file in tmp_path.iterdir()} == {f'{name}.png' for name in names}
    assert all(file.read_bytes()[:4] == b'\x89PNG' for file in tmp_path.iterdir())
    assert '| float32, injected 1e-3 | 151 | block3_0 |' in capsys.readouterr().out


def test_a_run_whose_features_stay_equal_is_not_broken():
    equal = {'linear: stem': 0.1, 'linear: block': 0.1, 'stem': 0.0, 'block': 0.0}
    assert not drawings.is_broken([equal, equal])
    assert drawings.is_broken([equal, equal | {'block': 1e-12}])
