import pytest

from zerojax.host import progress


@pytest.mark.parametrize(
    'num_steps,asymmetry,more',
    [
        (60, 0.0, '  30 s left  1.0 steps/s'),
        (60, 1.2345678e-12, '  30 s left'),
        (10**7, 1.2345678e-12, ''),
    ],
)
def test_an_evaluation_is_a_line_of_at_most_100_columns(
    monkeypatch, capsys, num_steps, asymmetry, more
):
    """Time left and speed, in this order, are there as far as they fit."""
    monkeypatch.setattr(progress.time, 'monotonic', iter([0.0, 30.0]).__next__)
    with progress.Progress(num_steps) as shown:
        shown.evaluated('step 0', loss=2.3, accuracy=0.1, broken='0/3')
        shown.advance(30)
        where = f'step {num_steps}/{num_steps}'
        values = {'loss': 2.345678e-12, 'accuracy': 0.54321, 'asymmetry': asymmetry}
        shown.evaluated(where, **values, broken='13/16')
    first, second = capsys.readouterr().out.splitlines()
    assert first == 'step 0  loss 2.3  accuracy 0.1  broken 0/3', 'no speed before the first step'
    line = f'{where}  loss 2.346e-12  accuracy 0.5432  asymmetry {asymmetry:.4g}  broken 13/16'
    assert second == line + more
    assert len(second) <= 100
