"""kvbench: what compressing the KV cache of a language model costs and gains, with error bars."""

__version__ = "0.2.0.dev0"
