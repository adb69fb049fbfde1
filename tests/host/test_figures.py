import pytest

from zerojax.host.figures import draw_run


@pytest.mark.parametrize('asymmetry', [0.0, 1e-3])
def test_a_figure_is_drawn_with_and_without_asymmetry(tmp_path, asymmetry):
    lines = [
        {'step': s, 'kind': kind, 'loss': 2.0, 'accuracy': 0.1, 'asymmetry': asymmetry}
        for s in (1, 2) for kind in ('train', 'eval')
    ]  # fmt: skip
    draw_run(lines, 1 if asymmetry else None, tmp_path / 'figures' / 'run.png')
    assert (tmp_path / 'figures' / 'run.png').read_bytes().startswith(b'\x89PNG')
