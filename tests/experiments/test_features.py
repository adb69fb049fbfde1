"""Features that part, as the last layer shows them."""

import csv

from experiments import features, runs


def test_rows_part_after_noise_and_are_equal_without(tiny_config, tmp_path):
    tiny_config.num_steps = 12
    tiny_config.model.update(name='mlp', init='averaging', width=8, convolution='direct')
    experiment = runs.Experiment('features', 'the command', tiny_config, tmp_path, seeds=1)
    features.run(experiment)
    with open(tmp_path / 'table.csv') as file:
        rows = list(csv.DictReader(file))
    for arm, number in (('noise of 1e-6', '8'), ('no noise', '1')):
        assert {row['different rows'] for row in rows if row['arm'] == arm} == {number}
    assert [row['step'] for row in rows][:3] == ['1', '2', '12']
    assert (tmp_path / 'figure.png').exists()
