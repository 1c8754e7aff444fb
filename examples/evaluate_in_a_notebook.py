"""Measure methods and look at the numbers as a frame: python examples/evaluate_in_a_notebook.py [MODEL]"""

import sys

import kvbench

model = sys.argv[1] if len(sys.argv) > 1 else "kvbench-tiny"
found = kvbench.evaluate(
    model, methods=["knorm", "snapkv:window=8"], ratios=[0.5], tasks=["minidocs"], limit=1, baselines=False,
    options={"block": 128},
)
frame = found.frame()
lines = frame[(frame.metric == "ppl") & frame.bin.isna()]
print(lines[["method", "variant", "ratio_realised", "value", "ci_low", "ci_high", "delta", "p_value"]].to_string())
print(f"kept in {found.folder}: kvbench report {found.folder}")
