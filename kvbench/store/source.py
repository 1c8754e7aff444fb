"""The code of methods of other packages: which files define them, and a hash that tells an edit."""

from __future__ import annotations

import hashlib
import inspect
import sys
from functools import cache
from pathlib import Path


def files_of(kind: type) -> tuple[Path, ...]:
    """Files that define a class and those it inherits from, in order; none of kvbench or of Python itself.

    Modules that these import are not among them.
    """
    found = []
    for parent in kind.__mro__:
        package = parent.__module__.partition(".")[0]
        if package == "kvbench" or package in sys.stdlib_module_names:
            continue
        try:
            found.append(inspect.getsourcefile(parent))
        except TypeError:  # defined without a file
            continue
    return tuple(Path(name) for name in dict.fromkeys(found) if name)


@cache
def source_of(kind: type) -> str:
    """Hash of the files of a class of another package; empty for our own, and for one without a file."""
    texts = [path.read_bytes() for path in files_of(kind) if path.is_file()]
    return hashlib.sha256(b"\0".join(texts)).hexdigest()[:12] if texts else ""
