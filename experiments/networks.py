"""A drawing of the networks: which stream of features each layer reads, and which it writes."""

from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from experiments import runs
from zerojax import models
from zerojax.models.network import StagedNetwork

STEP, HALF = 2.4, 0.6  # distance of two layers, half the width of a box
BRANCH = -1.15  # height of the residual branches under their stream
GREY = '0.6'


def box(axes: Any, x: float, y: float, text: str, left: str, right: str) -> None:
    """A layer: its left half in the colour of the stream that it reads, its right of its own."""
    # Opaque below, so that no line shines through.
    for color, alpha in (('white', 1), (None, 0.35)):
        for at, own in ((x - HALF, left), (x, right)):
            axes.add_patch(
                Rectangle((at, y - 0.3), HALF, 0.6, fc=color or own, lw=0, alpha=alpha, zorder=2)
            )
    axes.add_patch(Rectangle((x - HALF, y - 0.3), 2 * HALF, 0.6, fc='none', ec='0.2', lw=0.8))
    axes.text(x, y, text, ha='center', va='center', fontsize=8, zorder=4)


def line(axes: Any, xs: tuple[float, float], color: str) -> None:
    axes.plot(xs, (0, 0), color=color, lw=5, solid_capstyle='butt', zorder=1)


def draw_network(axes: Any, model: StagedNetwork, title: str) -> None:
    """Layers from left to right; a coloured line is a stream, a branch below it a residual one."""
    places = list(model.blocks())
    streams = list(dict.fromkeys(['stem', *(place.stream for place in places)]))
    colors = {name: runs.COLORS[i % len(runs.COLORS)] for i, name in enumerate(streams)}
    end = STEP * (len(places) + 1)
    axes.text(-1.1, 0, 'image', ha='right', va='center', fontsize=9)
    line(axes, (-1, 0), GREY)
    begins = {'stem': 0.0} | {
        p.stream: STEP * (p.number + 1) for p in reversed(places) if p.makes_features
    }
    for i, name in enumerate(streams):
        ends = begins[streams[i + 1]] if i + 1 < len(streams) else end
        line(axes, (begins[name], ends), colors[name])
        features = next((p.features for p in places if p.stream == name), model.stem_features)
        label = f'{name}\n{features} features'
        axes.text(begins[name], 0.4, label, fontsize=8, color=colors[name], ha='center')
    box(axes, 0, 0, 'conv\n3×3', GREY, colors['stem'])
    for place in places:
        x, left, right = STEP * (place.number + 1), colors[place.source], colors[place.stream]
        if not model.has_skips:
            box(axes, x, 0, 'conv\n3×3', left, right)
            continue
        if place.makes_features:
            box(axes, x, 0, 'BN, ReLU\nconv 1×1', left, right)
        box(axes, x, BRANCH, 'BN, ReLU\nconv 3×3', left, right)
        axes.text(x, BRANCH - 0.4, place.name, ha='center', va='top', fontsize=8, color='0.3')
        for start, stop, color in (
            ((x - 0.95, 0), (x - HALF, BRANCH), left),
            ((x + HALF, BRANCH), (x + 0.95, 0), right),
        ):
            axes.annotate(
                '', stop, start, arrowprops={'arrowstyle': '->', 'color': color, 'lw': 1.5}
            )
    line(axes, (end, end + 1), GREY)
    box(axes, end, 0, 'dense', colors[streams[-1]], GREY)
    axes.text(end + 1.1, 0, 'classes', va='center', fontsize=9)
    axes.set(
        xlim=(-2.4, STEP * 7 + 2.4), ylim=(BRANCH - 0.8 if model.has_skips else -0.5, 1.1),
        aspect='equal',
    )  # fmt: skip
    axes.set_title(title, fontsize=10)
    axes.set_axis_off()


def draw() -> Figure:
    """ConstNet and LeakyNet of ten layers, from their own declarations."""
    figure, (above, below) = runs.new_figure(2, 1, width=11, height=4.2)
    constnet = models.create('constnet', depth=10, width=1)
    leakynet = models.create('leakynet', depth=10, width=1, init='1_ii_ii_ii')
    assert isinstance(constnet, StagedNetwork) and isinstance(leakynet, StagedNetwork)
    title = 'ConstNet-10-1: residual connections add to the same features; a stage is one stream'
    draw_network(above, constnet, title)
    title = 'LeakyNet-10-1: no skip connections, so every layer makes a stream of its own'
    draw_network(below, leakynet, title)
    return figure
