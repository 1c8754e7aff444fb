"""The figure of learning curves: loss on held-out text against the tokens trained on, a panel for each ratio."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvbench.reporting.figures.base import LINES, SETTINGS, add_legend, save, style_of

WITHOUT = "0"
"""The ratio that scores of methods without one stand under."""


class Curve(NamedTuple):
    """Held-out losses of one adapter, or of a method without one.

    Attributes:
        points: tokens trained on, and by ratio the loss in nats per token; of a method without training, one with 0.
    """

    name: str
    method: str
    points: Sequence[tuple[int, dict[str, float]]]

    @property
    def is_trained(self) -> bool:
        return any(tokens for tokens, _ in self.points)


def training_figure(curves: Sequence[Curve], folder: Path, name: str) -> list[Path]:
    """Draw learning curves, as PNG and PDF; methods without training are horizontal lines.

    Curves are cut off where they are worse than reading without a cache (``none``), if that was measured.

    Returns:
        The files written; none if nothing was measured.
    """
    ratios = sorted({
        ratio for curve in curves for _, scores in curve.points for ratio in scores
        if ratio != WITHOUT or curve.method not in LINES
    })
    if not ratios:
        return []
    across = min(len(ratios), 3)
    down = -(-len(ratios) // across)
    with rc_context(SETTINGS):
        figure = Figure(figsize=(3.6 * across, 3.2 * down), layout="constrained")
        places = list(figure.subplots(down, across, squeeze=False).flat)
        for place, ratio in zip(places, ratios, strict=False):
            _draw(place, curves, ratio)
        for place in places[len(ratios) :]:
            place.set_axis_off()
        add_legend(figure, places[: len(ratios)])
        return save(figure, folder, name)


def _draw(place: Axes, curves: Sequence[Curve], ratio: str) -> None:
    """One panel; methods that remove nothing, or everything, are drawn in each."""
    worst = None
    for curve in curves:
        at = WITHOUT if curve.method in LINES else ratio
        found = [(tokens, scores[at]) for tokens, scores in curve.points if at in scores]
        style = style_of(curve.method if curve.name == curve.method else f"{curve.method}:{curve.name}")
        style |= {"label": curve.name}
        if not found:
            continue
        if curve.is_trained:
            place.plot([tokens / 1e6 for tokens, _ in found], [loss for _, loss in found], **style)
        else:
            place.axhline(found[0][1], **{**style, "marker": "", "linewidth": 1})
        worst = found[0][1] if curve.name == "none" else worst
    if worst is not None and place.get_ylim()[0] < worst:
        place.set_ylim(top=worst + 0.05)
    place.set_title(f"{ratio} removed" if ratio != WITHOUT else "methods without a ratio", fontsize=9)
    place.set_xlabel("million tokens trained on")
    place.set_ylabel("nats per held-out token")
