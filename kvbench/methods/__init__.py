"""Compression methods, one per file; ``registry.py`` lists them by name.

Other packages add methods through the entry point group ``kvbench.methods`` (docs/adding-a-method.md).
"""

from __future__ import annotations

from kvbench.methods.base import Effect, Method
from kvbench.methods.budget import kept, parse_ratio, ratio_text
from kvbench.methods.layouts.layout import RUNNING, Layout, TextStructure
from kvbench.methods.layouts.method import LAYOUT_IDS, LayoutMethod, layout_id, make_layout
from kvbench.methods.memories.memory import Memory
from kvbench.methods.memories.writer import ParallelWriter, Writer, embedded
from kvbench.methods.options import Option, option
from kvbench.methods.policies.policy import CachePolicy, LayerView
from kvbench.methods.registry import METHODS, make_method, unknown_method
from kvbench.store.faults import GROUP

__all__ = [
    "GROUP", "LAYOUT_IDS", "METHODS", "RUNNING", "CachePolicy", "Effect", "LayerView", "Layout", "LayoutMethod",
    "Memory", "Method", "Option", "ParallelWriter", "TextStructure", "Writer", "embedded", "kept", "layout_id",
    "make_layout", "make_method", "option", "parse_ratio", "ratio_text", "unknown_method",
]
