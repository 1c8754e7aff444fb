"""Talk with a model whose cache goes on being compressed: python examples/compress_a_chat.py [MODEL]"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvbench
from kvbench.models.references import assets

name = sys.argv[1] if len(sys.argv) > 1 else str(assets() / "kvbench-tiny")
model = AutoModelForCausalLM.from_pretrained(name).eval()
tokenizer = AutoTokenizer.from_pretrained(name)
turns = ["The harbour lay quiet in the morning. " * 12, "Three boats had already gone out.", "Who was there?"]

ids, cache = torch.empty(1, 0, dtype=torch.long), None
with kvbench.compress(model, "streaming-llm", ratio=0.5, during="both") as run:
    for turn in turns:
        said = tokenizer(turn + "\n", return_tensors="pt", add_special_tokens=not ids.numel()).input_ids
        ids = torch.cat([ids, said], 1)
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=16, do_sample=False,
            return_dict_in_generate=True,
        )
        answer, ids, cache = out.sequences[0, ids.shape[1] :], out.sequences, out.past_key_values
        print(f"{turn[:40]!r} -> {tokenizer.decode(answer)!r}")
        print(f"   {ids.shape[1]} tokens, {run.report.entries:.0f} entries, {run.report.bytes} bytes")
