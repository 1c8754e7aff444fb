"""The metrics of a profile: how they are shown, and their units and definitions."""

from __future__ import annotations

from kvbench.metrics.base import TIMING, Shown

PROFILE_SHOWN = {
    "ttft_s": Shown("first token s", 3, "low", (TIMING,)),
    "prefill_tok_s": Shown("prefill tok/s", 0, "high", (TIMING,)),
    "tpot_s": Shown("ms per token", 2, "low", (TIMING,), scale=1e3),
    "decode_tok_s": Shown("decode tok/s", 1, "high", (TIMING,), "tokens written per second"),
    "decode_speedup": Shown("speed-up", 2, "high", (TIMING,)),
    "decode_speedup_predicted": Shown("bytes predict", 2, None, (TIMING,)),
    "bandwidth_share": Shown("of bandwidth", 2, None, (TIMING,)),
    "prefill_peak_bytes": Shown("prefill peak MiB", 1, "low", (TIMING,), scale=2**-20),
    "decode_peak_bytes": Shown(
        "decode peak MiB", 1, "low", (TIMING,), "decode peak above weights, MiB", scale=2**-20
    ),
}
"""How the metrics that tables have are shown."""

PROFILE_METRICS = {
    "ttft_s": "s|prompt to first token: prefill, compression, choosing",
    "prefill_s": "s|the model's passes over the prompt",
    "compress_s": "s|what the method does beside them",
    "prefill_tok_s": "tokens/s|prompt x batch / prefill_s",
    "tpot_s": "s|(last - first token) / (tokens - 1)",
    "itl_s": "s|median gap between tokens; also p90, p95, p99",
    "decode_tok_s": "tokens/s|batch / tpot_s",
    "decode_speedup": "ratio|request by request over the faster full cache",
    "decode_speedup_predicted": "ratio|bytes that a step must read: full / method",
    "ttft_speedup": "ratio|as decode_speedup, of ttft_s",
    "bandwidth_share": "ratio|those bytes / tpot_s / copy bandwidth",
    "aa_gap": "ratio|distance of full-again from full",
    "tpot_per_entry_s": "s|slope of tpot_s over entries kept",
    "tpot_per_raw_s": "s|slope of tpot_s over tokens read",
    "weights_bytes": "bytes|model and adapter",
    "prefill_peak_bytes": "bytes|most allocated beyond the weights while the prompt is read",
    "decode_peak_bytes": "bytes|the same while text is written",
    "rss_peak_bytes": "bytes|most of the process in main memory",
    "max_batch": "rows|largest batch within --memory-budget",
}
