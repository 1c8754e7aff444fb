"""The protocols, with their options and the signatures of those for language modelling.

``block``: disjoint blocks, each read with a fresh cache. ``stream``: one long passage per
document. ``prefix``: the method compresses a prefix once, and what follows is scored without
further compression. They answer different questions and are never mixed in one row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvbench.errors import UserError, unknown

PROTOCOLS = ("block", "stream", "prefix", "online", "generate")
PRESETS = {"standard": 512, "paper": 256}
"""Block length by preset; the Sentinel scripts use 256."""

PREFIX_CONTEXT = 1280
STREAM_CHUNK = 64

OPTIONS: dict[str, tuple[str, ...]] = {
    "block": ("preset", "block", "chunk", "bos"),
    "stream": ("tokens", "chunk", "bos"),
    "prefix": ("prefix", "continuation", "chunk", "bos"),
    "online": ("chunk", "bos"),
    "generate": (
        "preset", "prefix", "new_tokens", "decode", "draws", "top_p", "temperature", "batch", "chunk", "bos",
    ),
}
"""Protocol options of ``--set``, by protocol."""

GENERATION_PRESETS = {"paper": (128, 64), "standard": (512, 128), "long": (1024, 256)}
"""Tokens of prefix and tokens to write; words for ``paper``, whose numbers are recalled, not verified."""

RECALL_OPTIONS = ("chunk", "bos", "question")
"""Those of the recall task, whose lengths are the task's own."""

HIDDEN, KNOWN = "hidden", "known"
"""Whether the question of a recall trial is read after the context was compressed, or is the end of it."""

_DEFAULTS = {
    "preset": "auto", "block": "auto", "tokens": "auto", "prefix": "auto",
    "continuation": "auto", "chunk": str(STREAM_CHUNK), "bos": "auto",
    "new_tokens": "auto", "decode": "both", "draws": "1", "top_p": "0.9", "temperature": "1", "batch": "auto",
    "question": "both",
}
_CHOICES = {
    "bos": ("auto", "true", "false"), "decode": ("both", "nucleus", "greedy"), "question": ("both", HIDDEN, KNOWN),
}
_LEAST = {
    "block": 32, "tokens": 32, "prefix": 32, "continuation": 1, "chunk": 1, "new_tokens": 1, "draws": 1, "batch": 1,
}
_SHARES = {"top_p": (0.0, 1.0), "temperature": (0.0, 100.0)}
"""Decimal options: above the first bound, up to the second."""


def protocol_options(protocol: str, names: Sequence[str], given: dict[str, str]) -> dict[str, str]:
    """The protocol's options of those names, defaults filled in, values checked.

    Raises:
        UserError: a value of the wrong kind.
    """
    resolved = {}
    for name in names:
        value = given.get(name, _DEFAULTS[name])
        if name == "preset":
            known = ("task", *GENERATION_PRESETS) if protocol == "generate" else tuple(PRESETS)
            value = known[0] if value == "auto" else value
            if value not in known:
                raise unknown(f"value for --set preset= with protocol {protocol}:", value, known)
        elif name in _SHARES:
            value = _decimal(name, value)
        elif name in _CHOICES:
            if value not in _CHOICES[name]:
                raise unknown(f"value for --set {name}=", value, _CHOICES[name])
        elif value != "auto" or _DEFAULTS[name] != "auto":
            if not value.isdecimal() or int(value) < _LEAST[name]:
                raise UserError(
                    f"--set {name}={value}: not a whole number of at least {_LEAST[name]}."
                )
            value = str(int(value))
        resolved[name] = value
    return resolved


def _decimal(name: str, value: str) -> str:
    low, high = _SHARES[name]
    try:
        number = float(value)
    except ValueError:
        number = float("nan")
    if not low < number <= high:
        raise UserError(f"--set {name}={value}: not a number above {low:g} and up to {high:g}.")
    return f"{number:g}"


@dataclass(frozen=True)
class Protocol:
    """A protocol with its lengths resolved for a model.

    Attributes:
        length: tokens of a block or stream, or of the prefix.
        continuation: tokens scored after the prefix; 0 otherwise.
        chunk: tokens fed at a time when streamed.
        bos: ``auto``, ``true`` or ``false``.
        beyond_context: the stream is longer than the model was made for.
    """

    name: str
    length: int
    continuation: int
    chunk: int
    bos: str
    beyond_context: bool = False

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that is read."""
        return self.length + self.continuation

    def signature(
        self, execution: str, has_bos: bool, tokenizer: str, trials: str | None = None, version: int = 1
    ) -> str:
        """The settings that decide what a number means.

        Args:
            trials: stand for the lengths where the task has some.
            version: of the pieces (:class:`kvbench.protocols.pieces.Piece`).
        """
        lengths = f"P:{self.length}|C:{self.continuation}" if self.continuation else f"L:{self.length}"
        lengths = trials or lengths
        step = f"chunk:{self.chunk}" if execution == "streamed" else "onepass"
        marks = "|beyond-context" if self.beyond_context else ""
        bos = "per_piece" if has_bos else "none"
        return f"{self.name}|{lengths}|{step}|bos:{bos}|reset:piece|tok:{tokenizer}{marks}|v:{version}"


def resolve_protocol(name: str, options: dict[str, str], context: int, model: str) -> Protocol:
    """Fill in what depends on the model's context length.

    Raises:
        UserError: the lengths do not fit the model.
    """
    chunk, bos = int(options["chunk"]), options["bos"]
    if name == "block":
        given = options["block"]
        length = PRESETS[options["preset"]] if given == "auto" else int(given)
        _check(length, context, model, f"--set block={context}")
        return Protocol(name, length, 0, chunk, bos)
    if name == "stream":
        given = options["tokens"]
        length = context if given == "auto" else int(given)
        return Protocol(name, length, 0, chunk, bos, beyond_context=length > context)
    if name == "online":
        return Protocol(name, context, 0, chunk, bos)
    whole = min(context, PREFIX_CONTEXT)
    given, more = options.get("prefix", "auto"), options.get("continuation", "auto")
    prefix = whole * 3 // 4 if given == "auto" else int(given)
    rest = whole - whole * 3 // 4 if more == "auto" else int(more)
    _check(prefix + rest, context, model, "a smaller --set prefix= or --set continuation=")
    return Protocol(name, prefix, rest, chunk, bos)


def _check(length: int, context: int, model: str, remedy: str) -> None:
    if length > context:
        raise UserError(
            f"Sequences of {length} tokens do not fit {model}: its context is {context} tokens.",
            f"Use {remedy}.",
        )
