"""``kvbench import kvpress``: numbers by hand, and what is refused."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from kvbench.errors import UserError
from kvbench.integrations.kvpress.references import parse_references
from kvbench.integrations.kvpress.settings import Settings, settings_of
from kvbench.store.answer_records import Answer
from kvbench.store.folder import RunFolder
from kvbench.store.records import IMPORTED
from tests.helpers.command import ROW_KEYS, Call, refused

MODEL = "Qwen/Qwen3-8B"
# Row -> task, question, references (as NumPy prints them), and answers by method. Scores: share of references, qa any.
ROWS = [
    ("niah_single_1", "What is the number for oak?", "['1234567']"),
    ("niah_single_1", "What is the number for elm?", "['7654321']"),
    ("niah_multivalue", "What are all numbers for ash?", "['11' '22' '33' '44']"),
    ("niah_multivalue", "What are all numbers for fir?", "['55' '66'\n '77' \"8'8\"]"),
    ("vt", "Which variables hold 12345?", "['ABC' 'DEF']"),
    ("qa_1", "Who keeps the mill?", "['Brindle' 'an otter']"),
]
FULL = ["1234567.", "It is 7654321", "11, 22, 33 and 44", "55 66 77 8'8", "abc def", "an Otter"]  # 1 1 1 1 1 1
SNAPKV = ["1234567", "no idea", "11 22", "55 66 77", "ABC\nDEF", ""]  # 1 0 .5 .75 1 0
KNORM = ["1234\n567", "", "44", "", "", "Brindle, of course"]  # 1 (control characters go) 0 .25 0 0 1

Make = Callable[..., Path]


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([columns, *rows])
    return text.getvalue()


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Writes a file as kvpress does, in a folder with its name, and ``config.yaml`` unless told otherwise."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def write(
        answers: Sequence[str], press: str, ratio: float = 0.0, config: str | None = "", query_aware: bool = False,
        rows: Sequence[tuple[str, str, str]] = ROWS, backwards: bool = False, dataset: str = "ruler__4096",
        where: str = "results",
    ) -> Path:
        name = f"{dataset}__{MODEL.replace('/', '--')}__{press}__{ratio:.2f}{'__query_aware' if query_aware else ''}"
        path = Path(where) / name / "predictions.csv"
        path.parent.mkdir(parents=True)
        columns = ["answer", "predicted_answer", "task", "compression_ratio", "question", "answer_prefix"]
        lines = [
            [references, answer, task, str(ratio), "" if query_aware else question, "Answer: "]
            for (task, question, references), answer in zip(rows, answers, strict=True)
        ]
        path.write_text(table(columns, lines[::-1] if backwards else lines), newline="")
        if config is not None:
            part = dataset.partition("__")
            path.with_name("config.yaml").write_text(
                f"dataset: {part[0]}\ndata_dir: {part[2] or 'null'}\nmodel: {MODEL}\npress_name: {press}\n"
                f"compression_ratio: {ratio}\nquery_aware: {str(query_aware).lower()}\nmodel_kwargs:\n"
                f"  torch_dtype: !!python/object/apply:torch.dtype\n  - bfloat16\nfp8: false\n{config}"
            )
        return path

    return write


def rows_of(document: dict[str, Any], metric: str = "answer_accuracy", **wanted: Any) -> Iterator[dict[str, Any]]:
    for row in document["rows"]:
        assert set(row) == ROW_KEYS
        of = {**row, **row["params"]}
        if row["metric"] == metric and all(of.get(name) == value for name, value in wanted.items()):
            yield row


def test_numbers_are_those_of_the_rule_by_hand(called: Call, make: Make) -> None:
    files = [make(FULL, "no_press"), make(SNAPKV, "snapkv", 0.5, backwards=True), make(KNORM, "knorm", 0.5, None)]
    found = called(["import", "kvpress", *files, "--out", "run", "--json"])
    assert found.code == 0, found.err
    for method, scores in (
        ("full", [1, 1, 1, 1, 1, 1]), ("snapkv", [1, 0, 0.5, 0.75, 1, 0]), ("knorm", [1, 0, 0.25, 0, 0, 1]),
    ):
        [row] = rows_of(found.document, method=method, bin=None)
        assert row["value"] == pytest.approx(sum(scores) / 6)
        assert row["ci_low"] <= row["value"] <= row["ci_high"]
        assert (row["n"], row["groups"], row["model"], row["task"]) == (6, 6, MODEL, "kvpress-ruler-4096")
        assert (row["removal"], row["ratio_realised"], row["entries_peak"]) == ("unverified", None, None)
        [single] = rows_of(found.document, method=method, bin="task=niah_single_1")
        assert single["value"] == pytest.approx(sum(scores[:2]) / 2)
        if method == "full":
            continue
        assert row["ratio_asked"] == 0.5
        assert row["delta"] == pytest.approx(sum(scores) / 6 - 1)
        assert row["baseline"] == "full"
        assert row["delta_ci_low"] < row["delta"] < row["delta_ci_high"] + 1e-9
        [lost] = rows_of(found.document, "negative_share", method=method)
        assert lost["value"] == pytest.approx(sum(score <= 0.5 for score in scores) / 6)
    [row] = rows_of(found.document, method="snapkv", bin=None)
    assert row["p_value"] >= 2 / 2**4  # four of six differ, all to one side: two of 16 signs are as far from zero
    measured = {row["metric"] for row in found.document["rows"]}
    assert measured == {"answer_accuracy", "negative_share"}  # nothing is invented
    record = next(iter(RunFolder(Path("run")).answers(RunFolder(Path("run")).cells()[0]).values()))
    assert (record.raw, record.held, record.peak, record.kv_physical, record.seconds) == (None,) * 5
    assert record.answers[0].ids is None


def test_it_is_a_run_like_any_other(called: Call, make: Make) -> None:
    files = [make(FULL, "no_press"), make(SNAPKV, "snapkv", 0.5), make(KNORM, "knorm", 0.25)]
    shown = called(["import", "kvpress", *files, "--out", "run"])
    assert shown.code == 0, shown.err
    assert "unverified: answered by another program" in shown.out
    assert "accuracy by task" in called(["import", "kvpress", *files, "--out", "run", "--wide"]).out
    report = called(["report", "run", "--out", "report"])
    assert report.code == 0, report.err
    assert Path("report/figures/answer_accuracy-removal.png").is_file()
    assert "unverified" in Path("report/tables/kvpress-ruler-4096.md").read_text()
    assert "imported from kvpress" in Path("report/report.html").read_text()
    pair = called(["compare", "run:snapkv:0.5", "run:knorm:0.25", "--json"])
    assert pair.code == 0, pair.err
    [whole] = (r for r in pair.document["rows"] if r["metric"] == "answer_accuracy" and r["params"]["bin"] is None)
    assert whole["delta"] == pytest.approx((2.25 - 3.25) / 6)
    documents = RunFolder(Path("run")).manifest().tasks[f"kvpress-ruler-4096@{MODEL}#0"].documents
    [qa] = [name for name in documents if name.startswith("qa_1")]
    text = called(["show", "run", "--document", qa])
    assert text.code == 0, text.err
    for words in ("Who keeps the mill?", "right: Brindle, an otter", "Brindle, of course", "(empty)", "knorm 0.25"):
        assert words in text.out
    assert called(["show", "run", "--document", "nobody"]).code == 2


def test_more_files_only_add(called: Call, make: Make) -> None:
    first, second = make(SNAPKV, "snapkv", 0.5), make(FULL, "no_press")
    alone = called(["import", "kvpress", first, "--out", "run", "--json"])
    assert alone.code == 0, alone.err
    assert "no file of the full cache" in alone.err
    [row] = rows_of(alone.document, bin=None)
    assert row["delta"] is None
    folder = RunFolder(Path("run"))
    before = folder.path.joinpath("cells", folder.cells()[0].key, "records.jsonl").read_bytes()
    both = called(["import", "kvpress", second, first.parent, "--out", "run", "--json"])
    assert both.code == 0, both.err
    assert "already there" in both.err
    [row] = rows_of(both.document, bin=None, method="snapkv")
    assert row["delta"] == pytest.approx(3.25 / 6 - 1)
    cells = folder.cells()
    assert [cell.name for cell in cells] == ["full", "snapkv"]
    assert {cell.execution for cell in cells} == {IMPORTED}
    assert folder.path.joinpath("cells", cells[1].key, "records.jsonl").read_bytes() == before


def test_the_full_cache_is_lent_to_known_questions(called: Call, make: Make) -> None:
    files = [make(FULL, "no_press"), make(SNAPKV, "snapkv", 0.5), make(KNORM, "finch", 0.5, query_aware=True)]
    found = called(["import", "kvpress", *files, "--out", "run", "--json"])
    assert found.code == 0, found.err
    [known] = rows_of(found.document, method="finch", question="known", bin=None)
    assert known["delta"] == pytest.approx(2.25 / 6 - 1)
    [hidden] = rows_of(found.document, method="snapkv", question=None, bin=None)
    assert hidden["delta"] == pytest.approx(3.25 / 6 - 1)
    assert called(["show", "run", "--task", "kvpress-ruler-4096:known"]).code == 0


def test_rows_of_one_context_are_resampled_together(called: Call, make: Make) -> None:
    columns = ["book", "question", "answer_prefix", "answer", "predicted_answer", "task"]
    for press, answers in (("no_press", ["a mill", "the otter", "7"]), ("tova", ["mill", "a cat", "Nothing"])):
        lines = [
            ["b1", "What is it?", "Answer:", "['The mill']", answers[0], "longbook_qa_eng"],
            ["b1", "Who is it?", "Answer:", "['otter', 'Brindle the otter']", answers[1], "longbook_qa_eng"],
            ["b2", "How many?", "Answer:", '["7"]', answers[2], "longbook_qa_eng"],
        ]
        Path(f"{press}.csv").write_text(table(columns, lines))
        found = called([
            "import", "kvpress", f"{press}.csv", "--method", press, "--ratio", "0.5", "--model", "m", "--dataset",
            "infinitebench", "--context", "book", "--out", "run", "--json",
        ])
        assert found.code == 0, found.err
    [row] = rows_of(found.document, method="tova", bin=None)
    assert (row["n"], row["groups"]) == (2, 2)
    assert row["value"] == pytest.approx((1 + 0) / 2 / 2)  # half of b1 is right, nothing of b2
    assert "contexts:book" in row["signature"]


def test_bad_files_are_sentences_with_their_line(called: Call, make: Make, tmp_path: Path) -> None:
    full = make(FULL, "no_press")
    asked = ["import", "kvpress"]
    text = full.read_text()

    def file(content: str, name: str = "snapkv") -> Path:
        path = Path(f"bad/ruler__4096__Qwen--Qwen3-8B__{name}__0.50/predictions.csv")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        return path

    def check(content: str, *words: str) -> None:
        refused(called, [*asked, full, file(content), "--out", "run"], *words)

    check(text.replace("predicted_answer", "prediction", 1), "line 1", "'predicted_answer'")
    check(text.replace("['1234567']", "1234567"), "line 2", "no list")
    check(text.replace("['7654321']", "[]"), "line 3", "no list")
    check(text.replace("['7654321']", "[__import__('os')]"), "line 3", "no list")
    check(text.replace("niah_single_1,0.0,What is the number for elm?", "niah_single_1"), "line 3", "fields")
    check(text + '"never closed', "line 9", "malformed")
    check(text + text.splitlines(keepends=True)[1], "line 9", "line 2 already")
    check(text.replace("elm", "yew"), "line 3", "5 of 6 contexts pair up")
    check("".join(text.splitlines(keepends=True)[:-1]), "lacks", "5 of 6 contexts pair up")
    check(text.splitlines()[0] + "\n", "no rows")
    check("", "empty")
    check(text.replace(",0.0,", ",much,"), "line 2", "'much' is not a number")
    refused(called, [*asked, "nowhere.csv", "--out", "run"], "no prediction file nowhere.csv")
    refused(called, [*asked, full, "--out", "run", "--method", "tova"], "config.yaml", "--method tova")
    Path("bare.csv").write_text(text)
    refused(called, [*asked, "bare.csv", "--out", "run"], "says the method", "--method")
    refused(called, [*asked, "bare.csv", "--out", "run", "--method", "tova", "--model", "m", "--dataset", "ruler"],
            "says the ratio")
    refused(called, [*asked, "bare.csv", "--out", "run", "--method", "tova", "--model", "m", "--dataset", "loogle",
                     "--ratio", "0.5"], "loogle", "ruler", "longbench")
    refused(called, [*asked, "bare.csv", "--out", "run", "--method", "tova", "--model", "m", "--dataset", "ruler",
                     "--ratio", "1.5"], "1.5")
    other = make(SNAPKV, "no_press", where="again")
    refused(called, [*asked, full, other, "--out", "run"], "are both of full")
    full.with_name("config.yaml").write_text("press_name: [\n")
    refused(called, [*asked, full, "--out", "run"], "config.yaml, line 2")
    full.with_name("config.yaml").write_text("press_name: snapkv\ncompression_ratio: much\n")
    refused(called, [*asked, full, "--out", "run"], "compression_ratio")
    (tmp_path / "work" / "taken").mkdir()
    (tmp_path / "work" / "taken" / "notes.txt").write_text("mine")
    refused(called, [*asked, full, "--out", "taken"], "not a kvbench run")


def test_what_was_asked_is_read_from_the_name(tmp_path: Path) -> None:
    for name, method, ratio, variant, known in (
        ("ruler__4096__meta-llama--Llama__snapkv__0.50", "snapkv", "0.5", "", False),
        ("ruler__4096__meta-llama--Llama__no_press__0.00__fraction0.100/1", "full", None, "", False),
        ("ruler__4096__meta-llama--Llama__kvzap_mlp__-4.00", "kvzap_mlp", None, "threshold=-4", False),
        ("ruler__4096__meta-llama--Llama__duo_attention__0.25", "duo_attention", None,
         "head_compression_ratio=0.25", False),
        ("ruler__meta-llama--Llama__snap_think__0.30__max_context8192__query_aware__key_channel_cr0.50", "snap_think",
         "0.3", "key_channel_compression_ratio=0.5", True),
        ("ruler__meta-llama--Llama__knorm__0.00", "full", None, "", False),
    ):
        found = settings_of(tmp_path / name / "predictions.csv", Settings())
        assert (found.method, found.ratio_text, found.variant, found.query_aware) == (method, ratio, variant, known)
        assert found.model == "meta-llama/Llama"
    assert found.task == "kvpress-ruler"


def test_what_kvpress_counted_is_a_note(called: Call, make: Make) -> None:
    path = make(SNAPKV, "kvzap_mlp", 0.0, None)
    path.with_name("config.yaml").write_text(
        f"dataset: ruler\ndata_dir: 4096\nmodel: {MODEL}\npress_name: kvzap_mlp\nthreshold: -4.0\n"
    )
    path.write_text(path.read_text().replace(",0.0,", ",0.43,"))
    found = called(["import", "kvpress", path, "--out", "run", "--json"])
    assert found.code == 0, found.err
    [row] = rows_of(found.document, bin=None)
    assert row["ratio_asked"] is None
    assert row["params"]["note"] == "kvpress counts 0.43 removed"
    assert row["params"]["variant"] == "threshold=-4"
    assert called(["report", "run"]).code == 0


@pytest.mark.parametrize(("text", "found"), [
    ("['a' 'b']", ("a", "b")), ("['a', 'b']", ("a", "b")), ('["it\'s" \'b\'\n \'c\']', ("it's", "b", "c")),
    ("['say \"x\"']", ('say "x"',)), (json.dumps(["a", "b ü"]), ("a", "b ü")), ("[1 2]", ("1", "2")),
    (r"['a\\b' 'c\'d']", ("a\\b", "c'd")), ("['[x]' ',']", ("[x]", ",")),
])
def test_references_are_read_one_by_one(text: str, found: tuple[str, ...]) -> None:
    assert parse_references(text, "here") == found


@pytest.mark.parametrize("text", ["", "a", "[]", "['a' b]", "['a''b']", "[None]", "['a'", "[['a']]", "['a' ...]"])
def test_what_is_no_list_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="here: the references are no list"):
        parse_references(text, "here")


def test_older_records_are_read_as_they_were() -> None:
    old = {"ids": [3, 4], "text": "x", "score": 1.0, "ended": True}
    assert Answer.load(old) == Answer((3, 4), "x", 1.0, True)
