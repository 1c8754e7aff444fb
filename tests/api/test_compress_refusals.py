"""What a compressed cache cannot follow is refused, where transformers would go on with something else."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList

from kvbench.api.compress import compress
from kvbench.errors import UserError
from kvbench.models.adapter import Adapter
from tests.helpers.models import VOCABULARY, small_adapter, small_model
from tests.helpers.zoo import zoo_model

N, NEW = 60, 12
GENERATE: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": 10_000, "pad_token_id": 0}


def prompt(rows: int = 1, n: int = N) -> Tensor:
    return torch.randint(1, VOCABULARY, (rows, n), generator=torch.Generator().manual_seed(4))


def test_other_inputs_than_text_are_not_dropped() -> None:
    model: Any = small_model("gpt2")
    with compress(model, "full"), pytest.raises(UserError, match="token_type_ids"):
        model.generate(prompt(), token_type_ids=torch.ones_like(prompt()), **GENERATE)
    with compress(model, "full"), pytest.raises(UserError, match="positions of its own"):
        model.generate(prompt(), position_ids=torch.arange(N)[None], **GENERATE)
    with compress(model, "full"), pytest.raises(UserError, match="inputs_embeds"):
        model.generate(inputs_embeds=torch.ones(1, 4, 64), **GENERATE)


def test_rows_of_a_filled_cache_are_not_made_up(llama: Any) -> None:
    with compress(llama, "knorm", 0.5) as run:
        context = run.prefill(prompt())
        with pytest.raises(UserError, match="holds 1 rows, and 3"):
            run.ask(context, prompt(1, 5), num_return_sequences=3, do_sample=True, max_new_tokens=4)
        with pytest.raises(UserError, match="3 questions are asked about 2"):
            run.ask(context.repeated(2), prompt(3, 5), **GENERATE)
        with pytest.raises(UserError, match="at least 1"):
            run.ask(context, prompt(1, 5)[:, :0], **GENERATE)
        with pytest.raises(UserError, match="its own attention_mask"):
            run.ask(context, prompt(1, 5), attention_mask=None, **GENERATE)
        mask = torch.ones(1, N + 5, dtype=torch.long)
        mask[:, 10:20] = 0
        ids = torch.cat([prompt(), prompt(1, 5)], 1)
        with pytest.raises(UserError, match="not that under which it was read"):
            llama.generate(ids, attention_mask=mask, past_key_values=context.cache.copy(), **GENERATE)


def test_a_window_is_no_full_cache() -> None:
    """Prompt and new tokens together; the prompt may be given by position, or read by prefill."""
    model = zoo_model("mistral", "sdpa", sliding_window=32)
    fits, beyond = {**GENERATE, "max_new_tokens": 4}, {**GENERATE, "max_new_tokens": 40}
    with compress(model, "full") as run:
        model.generate(prompt(1, 28), **fits)
        for call in (
            lambda: model.generate(prompt(1, 28), **beyond), lambda: model.generate(prompt(), **fits),
            lambda: run.prefill(prompt()), lambda: run.ask(run.prefill(prompt(1, 28)), prompt(1, 8), **fits),
        ):
            with pytest.raises(UserError, match="sliding_window 32"):
                call()


def test_rotations_by_length_are_those_of_one_text() -> None:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10_000.0}
    model = zoo_model("llama", "sdpa", rope_parameters=rope, max_position_embeddings=40)
    mask = torch.ones(2, N, dtype=torch.long)
    mask[1, :20] = 0
    with compress(model, "knorm", 0.5) as run:
        model.generate(prompt(), **GENERATE)
        with pytest.raises(UserError, match="rows are of unequal length"):
            model.generate(prompt(2), attention_mask=mask, **GENERATE)
        with pytest.raises(UserError, match="depend on the length of the whole text"):
            run.ask(run.prefill(prompt()), prompt(1, 5), **GENERATE)


def test_settings_are_merged_as_transformers_merges_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = small_model("llama")
    given = GenerationConfig(**GENERATE)
    with compress(model, "knorm", 0.5) as run:
        usual = model.generate(prompt(), **GENERATE)
        assert torch.equal(model.generate(prompt(), given), usual)
        assert torch.equal(model.generate(prompt(), given, LogitsProcessorList()), usual)
    monkeypatch.setattr(model.generation_config, "use_cache", False)
    with compress(model, "knorm", 0.5), pytest.raises(UserError, match="not to use a cache"):
        model.generate(prompt(), generation_config=given)
    monkeypatch.setattr(model.generation_config, "use_cache", True)
    monkeypatch.setattr(model.generation_config, "max_new_tokens", 40)
    del GENERATE["max_new_tokens"]
    try:
        with compress(model, "sinks", 0.5, during="both") as run:
            assert model.generate(prompt(), generation_config=GenerationConfig(**GENERATE)).shape[1] == N + 40
        assert run.report.tokens == N + 39
    finally:
        GENERATE["max_new_tokens"] = NEW


def test_a_layout_of_the_whole_text_ends_with_it(llama: Any) -> None:
    with compress(llama, "sinks", 0.5, during="both") as run, pytest.raises(UserError, match="planned for 60 tokens"):
        run.ask(run.prefill(prompt()), prompt(1, 5), **GENERATE)


def test_hooks_compiled_and_wrapped_models_are_refused() -> None:
    model: Any = small_model("llama")
    hook = model.register_forward_hook(lambda *_: None)
    with pytest.raises(UserError, match="forward hooks"), compress(model, "full"):
        pass
    hook.remove()
    from peft import LoraConfig, get_peft_model

    with pytest.raises(UserError, match="wraps another model"), compress(
        get_peft_model(model, LoraConfig(target_modules=["q_proj"])), "full"
    ):
        pass
    model.compile(backend="eager")
    with pytest.raises(UserError, match="compiled"), compress(model, "full"):
        pass


def test_nothing_is_read_outside_the_block(llama: Any) -> None:
    with compress(llama, "snapkv", 0.5, window=4) as run:
        context = run.prefill(prompt())
    for call in (lambda: run.prefill(prompt()), lambda: run.ask(context, prompt(1, 5)), lambda: run.load("x")):
        with pytest.raises(UserError, match="has been left"):
            call()


def test_a_snapshot_knows_its_adapter(llama: Any, tmp_path: Any) -> None:
    from dataclasses import replace

    folders = []
    for number in range(2):
        adapter: Adapter = small_adapter(llama)
        adapter.card = replace(adapter.card, method="sentinel")
        for pair in adapter.by_path.values():
            pair.b.mul_(number + 1)
        folders.append(tmp_path / str(number))
        adapter.save(folders[-1], "small")
    with compress(llama, "sentinel", 0.5, adapter=folders[0]) as run:
        run.prefill(prompt()).save(tmp_path / "s")
    with compress(llama, "sentinel", 0.5, adapter=folders[1]) as run, pytest.raises(UserError, match="adapter"):
        run.load(tmp_path / "s")


def test_a_broken_call_does_not_go_on(llama: Any) -> None:
    ids = prompt()
    with compress(llama, "knorm", 0.5) as run:
        cache = run.prefill(ids).cache
        wrong = torch.cat([ids, torch.full((1, 2), VOCABULARY + 5)], 1)
        with pytest.raises(IndexError):
            llama.generate(wrong, past_key_values=cache, **GENERATE)
        with pytest.raises(UserError, match="earlier call failed"):
            llama.generate(torch.cat([ids, ids[:, :2]], 1), past_key_values=cache, **GENERATE)


def test_inference_mode_threads_and_copies(llama: Any) -> None:
    ids, question = prompt(), prompt(1, 5)
    with compress(llama, "snapkv", 0.5, window=4, during="both") as run:
        usual = run.ask(run.prefill(ids), question, **GENERATE)
        with torch.inference_mode():
            context = run.prefill(ids)
        assert torch.equal(run.ask(context, question, **GENERATE), usual)
        apart = copy.deepcopy(context.cache)
        assert apart.compression is context.cache.compression
        assert torch.equal(run.ask(context, question, **GENERATE), usual)
        found: list[Tensor] = []
        workers = [
            threading.Thread(target=lambda: found.append(llama.generate(ids, **GENERATE))) for _ in range(3)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert len(found) == 3
        assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.parametrize(("more", "words"), [
    ({"budget_tokens": 7.5}, "budget_tokens=7.5"), ({"budget_tokens": True}, "budget_tokens=True"),
    ({"seed": -1}, "seed=-1"), ({"seed": None}, "seed=None"), ({"method": None}, "method=None is no method"),
    ({"ratio": 0.5, "adapter": 5}, "adapter=5"),
])
def test_arguments_of_another_type_are_sentences(llama: Any, more: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words), compress(llama, **{"method": "knorm", "ratio": None, **more}):
        pass


@pytest.mark.parametrize("ids", [prompt()[0], [[1, 2]], prompt().float(), prompt()[:0]])
def test_ids_of_another_shape_are_sentences(llama: Any, ids: Any) -> None:
    with compress(llama, "knorm", 0.5) as run:
        for call in (lambda: run.prefill(ids), lambda: llama.generate(ids, **GENERATE)):
            with pytest.raises(UserError, match="whole numbers"):
                call()
        with pytest.raises(UserError, match="shape of input_ids"):
            run.prefill(prompt(), torch.ones(1, N - 10))


def test_an_adapter_of_another_model_is_refused(tmp_path: Any, model_folder: Any) -> None:
    """Of the same shape: by the files of the folder that the model was loaded from."""
    from dataclasses import replace

    from transformers import AutoModelForCausalLM

    from kvbench.models.fingerprint import fingerprint

    folder = model_folder("llama")
    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    adapter = small_adapter(model)
    for name, base in (("mine", fingerprint(folder)), ("other", "0123456789ab")):
        adapter.card = replace(adapter.card, method="sentinel", base_hash=base)
        adapter.save(tmp_path / name, "small")
    with compress(model, "sentinel", 0.5, adapter=tmp_path / "mine"):
        pass
    with pytest.raises(UserError, match="another base model"), compress(
        model, "sentinel", 0.5, adapter=tmp_path / "other"
    ):
        pass


def test_a_damaged_snapshot_is_a_sentence(llama: Any, tmp_path: Any) -> None:
    """Values that no cache has, names that no object may be given."""
    import json

    from safetensors import safe_open
    from safetensors.torch import save_file

    path = tmp_path / "s"
    with compress(llama, "knorm", 0.5) as run:
        run.prefill(prompt()).save(path)
        with safe_open(str(path), "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata()
        for old, new in (
            ('"float32"', '"load"'), ('"keys"', '"__class__"'), ('"PolicyLayer"', '"Path"'), ('"t2"', '"t99"'),
        ):
            content = metadata["content"].replace(old, new)
            assert content != metadata["content"]
            json.loads(content)
            save_file(tensors, path, {**metadata, "content": content})
            with pytest.raises(UserError, match="damaged"):
                run.load(path)
