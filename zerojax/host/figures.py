"""Figures of one run."""

import contextlib
import io
import pathlib
import threading
from collections.abc import Callable
from typing import Any

from zerojax.host import objectstore, terminal
from zerojax.host.errors import first_line
from zerojax.host.records import Record, replace_file


def import_in_background() -> None:
    """Begins to import Matplotlib, which takes a second or more; whoever draws waits for the end.

    If it cannot be imported, whatever the reason, that is for the one who draws to say.
    """

    def import_it() -> None:
        with contextlib.suppress(Exception):
            import matplotlib.backends.backend_agg  # noqa: F401

    threading.Thread(target=import_it, name='import of Matplotlib').start()


def try_to_draw(path: pathlib.Path, draw: Callable[[], object]) -> bool:
    """Whether `draw` made the figure `path`; if not, a line on stderr says why, and no more.

    A figure is the last and least that a command leaves: LaTeX or a font that is missing, a
    matplotlibrc of the user's or a full disk takes nothing else with it.
    """
    try:
        draw()
    except Exception as error:
        kind = type(error).__name__
        terminal.complain(f'note: {path} could not be drawn ({kind}: {first_line(error)})')
        return False
    return True


def draw_run(
    lines: list[Record], broken_streams: dict[str, int | None], path: pathlib.Path
) -> None:
    """Draws loss, accuracy and each stream's asymmetry (log axis) against the step into a PNG.

    `broken_streams` as in summary.json; the steps of single streams are marked if they differ.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    train = [line for line in lines if line['kind'] == 'train']
    evals = [line for line in lines if line['kind'] == 'eval']
    figure = Figure(figsize=(7, 7.5), layout='constrained')
    FigureCanvasAgg(figure)
    loss, accuracy, asymmetry = figure.subplots(3, 1, sharex=True)

    def curve(axes: Any, records: list[Record], name: str, **style: Any) -> None:
        axes.plot([r['step'] for r in records], [r[name] for r in records], **style)

    curve(loss, train, 'loss', color='C0', lw=1, label='training batch')
    curve(loss, evals, 'loss', color='C1', marker='o', ms=3, label='held-out set')
    loss.set_ylabel('cross-entropy (nats)')
    loss.set_ylim(bottom=0)
    curve(accuracy, train, 'accuracy', color='C0', lw=1, label='training batch')
    curve(accuracy, evals, 'accuracy', color='C1', marker='o', ms=3, label='held-out set')
    accuracy.set_ylabel('accuracy')
    accuracy.set_ylim(0, 1.02)

    broken_at_steps = {at_step for at_step in broken_streams.values() if at_step is not None}
    broken = [line for line in train if line['asymmetry'] > 0]
    asymmetry.set_yscale('log')
    # A run that an older version began has lines without streams, but for its last ones.
    for i, stream in enumerate(train[-1]['asymmetry_by_stream']):
        of_stream = [
            (line['step'], line['asymmetry_by_stream'][stream])
            for line in broken
            if line.get('asymmetry_by_stream', {}).get(stream, 0) > 0
        ]
        style = {'color': f'C{i + 2}', 'label': stream}
        at_step = broken_streams[stream]
        if at_step is not None and len(broken_at_steps) > 1:
            style['label'] = f'{stream}, broken at {at_step}'
            asymmetry.axvline(at_step, color=style['color'], ls=':', lw=1.2)
        if of_stream:
            asymmetry.plot(*zip(*of_stream, strict=True), lw=1.2, **style)
    if not broken:
        asymmetry.set_ylim(1e-8, 10)
        asymmetry.text(
            0.5, 0.5, 'exactly 0 at every step', ha='center', transform=asymmetry.transAxes
        )
    asymmetry.set_ylabel('asymmetry of each stream')
    asymmetry.set_xlabel('step')
    for axes in (loss, accuracy, asymmetry):
        if broken_at_steps:
            first = min(broken_at_steps)
            axes.axvline(
                first, color='0.3', ls='--', lw=1, zorder=1, label=f'symmetry broken at {first}'
            )
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8, frameon=False)
        axes.grid(alpha=0.3)
    save_png(figure, path)


def save_png(figure: Any, path: pathlib.Path) -> None:
    """Writes a Matplotlib figure, whose folder is made if it is missing."""
    content = io.BytesIO()
    figure.savefig(content, format='png', dpi=120)
    if not objectstore.in_store(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, content.getvalue())
