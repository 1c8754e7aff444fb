"""The table of recipes."""

from __future__ import annotations

from kvbench.data.samples.documents import DocumentQuestion
from kvbench.data.samples.lists import CommonWords, FrequentWords, VariableTracking
from kvbench.data.samples.lookup import KeyValues, PassKey
from kvbench.data.samples.needles import NeedleGrid, Needles
from kvbench.data.samples.orders import Instructions
from kvbench.data.samples.sample import Recipe
from kvbench.data.samples.stories import Story
from kvbench.data.samples.sums import Arithmetic

RECIPES: dict[str, type[Recipe]] = {
    recipe.name: recipe for recipe in (
        Needles, NeedleGrid, VariableTracking, CommonWords, FrequentWords, PassKey, KeyValues, Story, Instructions,
        Arithmetic, DocumentQuestion,
    )
}
