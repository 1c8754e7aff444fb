"""The content of a queue file: settings for all adapters at its top, and one table for each adapter."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from kvbench.methods.budget import parse_ratio, ratio_text
from kvbench.models.references import DEFAULT_MODEL, expand_home
from kvbench.training.held_out import DOCUMENTS, RATIOS
from kvbench.training.request import AdapterRequest


class AdapterSettings(BaseModel):
    """Settings of a training, for all adapters of a file or for one of them.

    Attributes:
        model, revision: the base model.
        data: files of training text; ``held_out``: one of other text; ``column``: what their text is called.
        tokens: text tokens to train on in all.
        every: text tokens between checkpoints and measurements; 0 for a tenth of ``tokens``.
        warmup: text tokens of linear warm-up of the rate; 0 for a tenth of ``tokens``, at most 100 steps. Adapters that
            differ in their ``tokens`` only share their steps before the rate falls, if they have the same warm-up.
        batch_size, length: sequences per step, and text tokens per sequence.
        lr, rank, seed: peak learning rate, rank of the low-rank pairs, seed.
        set: what ``--set`` takes.
        ratios, documents, recall: what is measured on held-out text: at which ratios, on how many documents, and
            whether facts are to be recalled.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    model: str = DEFAULT_MODEL
    revision: str | None = None
    data: list[str] = Field(default_factory=list)
    held_out: str | None = None
    column: str = "text"
    tokens: int = Field(default=1_280_000, gt=0)
    every: int = Field(default=0, ge=0)
    warmup: int = Field(default=0, ge=0)
    batch_size: int = Field(default=2, ge=1)
    length: int = Field(default=512, ge=32)
    lr: float = Field(default=2e-3, ge=0)
    rank: int = Field(default=64, ge=1)
    seed: int = Field(default=0, ge=0, le=2**31 - 1)
    set: dict[str, str] = Field(default_factory=dict)
    ratios: list[str] = Field(default=list(RATIOS), min_length=1)
    documents: int = Field(default=DOCUMENTS, ge=1)
    recall: bool = True


class AdapterEntry(AdapterSettings):
    """One ``[[adapter]]`` of the file.

    Attributes:
        method: the trained method.
        name: its folder in ``out``; the method's name if left out.
    """

    method: str
    name: str = Field(default="", pattern=r"^(\w[\w.+-]*)?$")

    @property
    def folder(self) -> str:
        """Name of its folder."""
        return self.name or self.method


class QueueFile(AdapterSettings):
    """The content of a queue file.

    Attributes:
        out: folder in which every adapter has a folder of its own; relative to the queue file.
        about: what is to be found out, and by which rule; for the reader.
        slice: text tokens of a turn; 0 to train one adapter after the other.
        beside: methods without adapters that are measured once on the held-out text.
        adapter: the adapters, in their order.
    """

    out: str = Field(min_length=1, pattern=r"^[^\x00]+$")
    about: str = ""
    slice: int = Field(default=0, ge=0)
    beside: list[str] = Field(default_factory=list)
    adapter: list[AdapterEntry] = Field(min_length=1)


def place_of(here: Path, given: str) -> Path:
    """A path in a queue file that lies in the folder ``here``: relative to that, or to the home directory."""
    return here / expand_home(given)


def request_of(
    file: QueueFile, entry: AdapterEntry, here: Path, out: Path, device: str, threads: int
) -> AdapterRequest:
    """What one adapter of a queue file is trained with: its own settings, and those at the top of the file.

    Args:
        here: folder of the file; ``out``: folder of all its adapters.

    Raises:
        UserError: a ratio is none.
    """
    own = {name: getattr(entry, name) for name in entry.model_fields_set & set(AdapterSettings.model_fields)}
    made = file.model_copy(update={**own, "set": {**file.set, **entry.set}})
    per_step = made.batch_size * made.length
    steps = -(-made.tokens // per_step)
    model = place_of(here, made.model)
    is_path = made.model.startswith((".", "~", "/")) or model.is_dir()
    return AdapterRequest(
        method=entry.method, data=tuple(place_of(here, one) for one in made.data), out=out / entry.folder,
        model=str(model) if is_path else made.model, revision=made.revision, steps=steps, batch=made.batch_size,
        length=made.length, lr=made.lr, rank=made.rank,
        held_out=None if made.held_out is None else place_of(here, made.held_out),
        every=max(1, made.every // per_step if made.every else steps // 10), seed=made.seed, options=made.set,
        device=device, threads=threads, column=made.column,
        ratios=tuple(ratio_text(parse_ratio(ratio)) for ratio in made.ratios), documents=made.documents,
        recall=made.recall, warmup=max(1, made.warmup // per_step) if made.warmup else 0, shared=out / ".shared",
    )
