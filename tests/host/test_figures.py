import pytest

from zerojax.host.figures import draw_run


def drawn(folder, by_stream, first=None, **broken_at):
    """The PNG of a run of two steps; the first has other values if they are given. Streams broke
    with the first update, or as said."""
    lines = [
        {'step': step, 'kind': kind, 'loss': 2.0, 'accuracy': 0.1,
         'asymmetry': max(by_stream.values()), 'asymmetry_by_stream': by_stream}
        for step in (1, 2) for kind in ('train', 'eval')
    ]  # fmt: skip
    if first is not None:
        lines[0] = {k: v for k, v in lines[0].items() if k != 'asymmetry_by_stream'} | first
    broken = {name: 1 if value else None for name, value in by_stream.items()} | broken_at
    draw_run(lines, broken, folder / 'figures' / 'run.png')
    return (folder / 'figures' / 'run.png').read_bytes()


@pytest.mark.parametrize('asymmetry', [0.0, 1e-3])
def test_a_figure_is_drawn_with_and_without_asymmetry(tmp_path, asymmetry):
    assert drawn(tmp_path, {'a': asymmetry}).startswith(b'\x89PNG')


def test_each_stream_that_is_broken_is_a_line(tmp_path):
    found = [
        drawn(tmp_path, {'a': 1e-3, 'b': b, 'c': c}) for b, c in ((0, 0), (1e-5, 0), (1e-5, 1e-4))
    ]
    assert len(set(found)) == 3
    assert drawn(tmp_path, {'a': 1e-3, 'b': 0, 'c': 0}) == found[0]


def test_when_each_stream_broke_is_marked_where_they_differ(tmp_path):
    streams = {'a': 1e-3, 'b': 1e-5, 'c': 0}
    found = [drawn(tmp_path, streams, b=at_step) for at_step in (1, 0, 2)]
    assert len(set(found)) == 3
    plain = {'a': 1e-3, 'b': 1e-5}
    assert drawn(tmp_path, plain, a=0, b=0) != drawn(tmp_path, plain, a=0, b=1)


def test_a_run_that_an_older_version_began_is_drawn_from_where_streams_are_known(tmp_path):
    whole = drawn(tmp_path, {'a': 1e-3})
    assert drawn(tmp_path, {'a': 1e-3}, first={}) != whole
