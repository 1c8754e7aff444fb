"""The metrics of a profile, by name: what each is, in a few words."""

from __future__ import annotations

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
