"""LaTeX: escapes text, and formats tables, which need ``\\usepackage{booktabs}``."""

from __future__ import annotations

import re
import unicodedata

from kvbench.reporting.tables.plain import Table

_SPECIAL = {
    "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}", "\\": r"\textbackslash{}", "|": r"\textbar{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "±": r"$\pm$", "\N{MINUS SIGN}": r"$-$", "\N{MULTIPLICATION SIGN}": r"$\times$",
    "·": r"$\cdot$", "µ": r"$\mu$", "\N{HYPHEN}": "{}-", "\N{EN DASH}": "--", "\N{EM DASH}": "---",
    "\N{LEFT DOUBLE QUOTATION MARK}": "``", "\N{RIGHT DOUBLE QUOTATION MARK}": "''",
    "\N{LEFT SINGLE QUOTATION MARK}": "`", "\N{RIGHT SINGLE QUOTATION MARK}": "'", "…": r"\ldots{}", "ß": r"{\ss}",
    "ø": r"{\o}", "ł": r"{\l}",
}
_ACCENTS = {
    "\u0300": "`", "\u0301": "'", "\u0302": "^", "\u0303": "~", "\u0304": "=", "\u0307": ".", "\u0308": '"',
    "\u030a": "r ", "\u030b": "H ", "\u030c": "v ", "\u0327": "c ", "\u0306": "u ",
}


def escaped(text: str) -> str:
    """Escape text for LaTeX, in ASCII: what no standard font has is written as its code point."""
    # Two hyphens would be set as a dash, and a line that begins with * or [ would belong to the \\ before it.
    found = "".join(map(_letter, re.sub("(?<=-)-", "\N{HYPHEN}", " ".join(text.split()))))
    return f"{{}}{found}" if found.startswith(("*", "[")) else found


def accented(text: str) -> str:
    """Replace letters beyond ASCII by LaTeX's commands, and leave everything else as it is."""
    return "".join(letter if letter.isascii() else _letter(letter) for letter in text)


def _letter(letter: str) -> str:
    if letter in _SPECIAL:
        return _SPECIAL[letter]
    if letter.isascii():
        return letter if letter.isprintable() else ""
    base, *marks = list(unicodedata.normalize("NFD", letter))
    if len(marks) == 1 and base.isascii() and marks[0] in _ACCENTS:
        return rf"{{\{_ACCENTS[marks[0]]}{base}}}"
    return f"[U+{ord(letter):04X}]"


def slug(text: str) -> str:
    """Text as part of file names and labels, which neither LaTeX nor a shell misreads."""
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-").lower() or "x"


def latex(table: Table, is_wide: bool = False, size: str = r"\small", align: str = "l") -> str:
    r"""Format a table as LaTeX; it needs ``\usepackage{booktabs}``.

    Args:
        is_wide: whether it spans both columns of a page.
        size: command for the size of its text; ``align``: alignment of the columns after the first.
    """
    kind = "table*" if is_wide else "table"
    body = [
        [(rf"\textbf{{{escaped(entry.text)}}}" if entry.is_best else escaped(entry.text)) for entry in row]
        for row in table.rows
    ]
    note = f" {escaped(table.notes[0])}" if table.notes else ""
    lines = [
        rf"\begin{{{kind}}}", r"\centering", size, rf"\caption{{{escaped(table.title)}.{note}}}",
        rf"\label{{tab:{slug(table.name)}}}",
        rf"\begin{{tabular}}{{@{{}}l{align * (len(table.columns) - 1)}@{{}}}}", r"\toprule",
        " & ".join(_heading(column) for column in table.columns) + r" \\", r"\midrule",
        *(" & ".join(row) + r" \\" for row in body), r"\bottomrule", r"\end{tabular}",
        *(f"% {' '.join(note.split())}" for note in table.notes), rf"\end{{{kind}}}",
    ]
    return "\n".join(lines) + "\n"


def _heading(text: str) -> str:
    """A heading; one of several lines is set as such."""
    lines = [escaped(line) for line in text.split("\n")]
    return lines[0] if len(lines) == 1 else r"\shortstack[r]{" + r" \\ ".join(lines) + "}"
