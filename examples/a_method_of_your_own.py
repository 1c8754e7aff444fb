"""A method of your own, used at once: python examples/a_method_of_your_own.py [MODEL] (see docs/adding-a-method.md)"""

import sys
from dataclasses import dataclass

from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvbench
from kvbench.methods import CachePolicy, LayerView, option
from kvbench.models.references import assets


@dataclass(frozen=True)
class LargeValues(CachePolicy):
    """Keeps the entries whose values have the largest norm of order ``order``."""

    name, summary = "large-values", "the entries with the largest values"
    order: int = option(2, "order of the norm", least=1)

    def scores(self, view: LayerView) -> Tensor:
        return view.values.float().norm(p=self.order, dim=-1)


name = sys.argv[1] if len(sys.argv) > 1 else str(assets() / "kvbench-tiny")
model, tokenizer = AutoModelForCausalLM.from_pretrained(name).eval(), AutoTokenizer.from_pretrained(name)
with kvbench.compress(model, LargeValues(order=1), ratio=0.5) as run:
    model.generate(**tokenizer("The harbour lay quiet. " * 20, return_tensors="pt"), max_new_tokens=16, do_sample=False)
print(run.report)
