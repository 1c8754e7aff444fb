"""Figure of the attention masks of methods: which earlier entries each token sees."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from kvbench.reporting.figures.base import SETTINGS, save

_COLOURS = ("#FFFFFF", "#56B4E9", "#D55E00", "0.25")
"""Colours of: not seen; a text token; an entry that stands for others; the token itself. They differ in lightness,
so that they can be told apart in greyscale."""
_ACROSS = 5


def mask_figure(masks: dict[str, Any], chosen: Sequence[str], folder: Path) -> list[Path]:
    """Draw one panel per method; rows are queries, columns are entries.

    Args:
        masks: method and ratio -> mask, as stored in the run folder.
        chosen: which of them to draw, in order.

    Returns:
        The files written; none if there is nothing to draw.
    """
    names = [name for name in chosen if name in masks]
    if not names:
        return []
    across = min(len(names), _ACROSS)
    down = -(-len(names) // across)
    with rc_context(SETTINGS | {"axes.grid": False, "axes.spines.top": True, "axes.spines.right": True}):
        figure = Figure(figsize=(1.9 * across, 2.05 * down + 0.35), layout="constrained")
        places = list(figure.subplots(down, across, squeeze=False).flat)
        for place, name in zip(places, names, strict=False):
            _panel(place, masks[name])
            place.set_title(name, fontsize=8)
        for place in places[len(names) :]:
            place.set_axis_off()
        labels = ("a token of the text", "an entry that stands for others", "the token itself")
        figure.legend(
            handles=[Patch(facecolor=c, edgecolor="0.5", label=t) for c, t in zip(_COLOURS[1:], labels, strict=True)],
            loc="outside lower center", ncols=3, fontsize=8,
        )
        return save(figure, folder, "masks")


def _panel(place: Axes, mask: dict[str, Any]) -> None:
    seen = np.array([[letter == "1" for letter in row] for row in mask["rows"]], dtype=np.int64)
    stands = np.array([letter != "r" for letter in mask["kinds"]])
    picture = seen * np.where(stands, 2, 1)[None, :]
    np.fill_diagonal(picture, 3)
    place.imshow(picture, cmap=ListedColormap(list(_COLOURS)), vmin=0, vmax=3, interpolation="nearest")
    place.set_xticks([])
    place.set_yticks([])
