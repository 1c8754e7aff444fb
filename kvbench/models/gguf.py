"""Models in GGUF files, dequantised once into a folder of kvbench's cache.

A dequantised model is that of the file: its identity is the hash of the file and the number of this conversion, and not
the bytes of the folder, which change with the version of transformers. The folder is held against the hash that it had
when it was written.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from kvbench.errors import MissingPackageError, UserError
from kvbench.models.fingerprint import DEQUANTISED, contents_hash
from kvbench.parsing import bytes_of
from kvbench.store.cached import cache_folder, filled_once
from kvbench.store.hashes import file_hashes

MAGIC = b"GGUF"
CONVERSION = 1
"""Goes up when the same file would give other weights or another tokenizer."""


def dequantised(path: Path, name: str = "") -> Path:
    """The folder of the model in a GGUF file, converted at the first call.

    Args:
        name: of the folder; that of the file if empty.

    Raises:
        UserError: the file is damaged, or of a kind that transformers cannot read.
        MissingPackageError: the package ``gguf`` is not installed.
    """
    try:
        digest = file_hashes([path])[path]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    folder = cache_folder() / "models" / f"{name or path.stem}-{digest[:16]}.{CONVERSION}"

    def fill(part: Path) -> None:
        _convert(path, part)
        card = {"gguf": digest, "conversion": CONVERSION, "contents": contents_hash(part)}
        (part / DEQUANTISED).write_text(json.dumps(card) + "\n", encoding="utf-8")

    try:
        return filled_once(folder, fill)
    except OSError as error:
        raise UserError(f"{path} cannot be converted into {folder}: {error}.") from error


def _what_to_do(path: Path) -> str:
    """What to do about a file that cannot be read, which may be damaged or only of a strange family."""
    from gguf import GGUFReader

    with path.open("rb") as file:
        if file.read(4) != MAGIC:
            return "It is no GGUF file, but perhaps a web page or a pointer that was saved instead: download it again."
    try:
        GGUFReader(path)
    except Exception:  # the reader maps what should be there, and fails in as many ways as a file can be cut off
        return f"The file may be incomplete ({bytes_of(path.stat().st_size)}) or damaged: download it again."
    return "Give a GGUF file of a family that transformers knows."


@contextmanager
def _without_bar() -> Iterator[None]:
    """Within the block, transformers draws no progress of dequantising, which its own switch does not turn off."""
    from transformers import modeling_gguf_pytorch_utils as reader

    before = reader.tqdm
    reader.tqdm = partial(before, disable=True)
    try:
        yield
    finally:
        reader.tqdm = before


def _convert(path: Path, folder: Path) -> None:
    """Read the file by transformers, and write weights in float32 (exact for every kind of quantisation) and tokenizer.

    Raises:
        UserError: transformers cannot read it.
    """
    try:
        import gguf  # noqa: F401 - transformers only says that something is missing
    except ImportError as error:
        raise MissingPackageError("GGUF files need the package gguf.", "pip install 'kvbench[real]'.") from error
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print(f"kvbench: dequantising {path.name}, once; this takes about half a minute.", file=sys.stderr, flush=True)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        with _without_bar():
            model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(**source)
    except Exception as error:  # of the reader, of transformers, or of a family that it does not know
        reason = str(error).rstrip(".") or type(error).__name__
        raise UserError(f"{path} cannot be read as a model: {reason}.", _what_to_do(path)) from error
    config = type(model.config).from_dict(
        {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    )
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # a quantised model cannot be saved
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
