"""Data sets of questions: what their rows become, how long prompts are cut, and how answers are scored."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from rouge import Rouge

from kvbench.data.documents import load_corpus
from kvbench.data.samples import qa_scoring
from kvbench.data.samples.scoring import SCORING
from kvbench.data.tasks import Task, load_task, task_names
from kvbench.errors import UserError
from kvbench.models.loading import load_model
from kvbench.models.references import resolve_model
from kvbench.protocols.pieces import Tokenizer, make_tokenizer
from kvbench.protocols.question_rows import QuestionRows
from tests.helpers.command import Call

SETS = [name for name in task_names() if load_task(name).kind == "questions"]
OPTIONS = {"length": "400", "template": "auto", "stop": "end", "chunk": "64", "bos": "auto"}
TEXT = "The ferry left at nine. Nobody had seen the keeper since Easter, and the lamp was out. "


def row(task: Task, number: int) -> dict[str, Any]:
    """A row with the columns that the hub has, according to the data sets' own pages."""
    name = f"Anselm{number}"
    match task.name.split("-")[0]:
        case "longbench":
            choice = {"choice_A": "one", "choice_B": name, "choice_C": "two", "choice_D": "three"}
            classes = ["Person", "Place", name]
            if task.name == "longbench-v2":
                return {"_id": number, "question": "Who?", "answer": "B", "context": TEXT, "length": "short", **choice}
            return {"input": "Who kept it?", "context": TEXT, "answers": [name, "keeper 7"], "all_classes": classes}
        case "scbench":
            turns = [
                {"input": f"Who was it, {turn}?", "answer": name, "options": ["x", name, "y", "z"]} for turn in range(3)
            ]
            return {"id": number, "context": TEXT, "multi_turns": turns}
        case "babilong":
            return {"input": TEXT, "question": "Where is Mary?", "target": task.questions.labels[1]}  # type: ignore[union-attr, index]
        case "infinitebench":
            return {"id": number, "context": TEXT, "input": "What is it?", "answer": [number + 7], "options": []}
    raise ValueError(task.name)


def written(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer(load_model(resolve_model("kvbench-tiny"), "cpu", "float32").tokenizer, "auto")


def cut(task: Task, path: Path, tokenizer: Tokenizer, **options: str) -> list[Any]:
    protocol = QuestionRows.resolve(task, {**OPTIONS, **options}, 1024, "kvbench-tiny")
    return list(protocol.pieces(load_corpus(task, path).documents, tokenizer, 0, False))


@pytest.mark.parametrize("name", SETS)
def test_three_rows_of_every_set(name: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    task = load_task(name)
    rows = [row(task, number) for number in range(3)]
    for known in ("hidden", "known"):
        found = cut(task, written(tmp_path / "rows.jsonl", rows), tokenizer, question=known, length="1000")
        assert len(found) == 3
        assert {document.group for document, _ in found} == {found[0][0].id}  # one text: resampled together
        for _, one in found:
            assert len(one.pieces) == (3 if name.startswith("scbench") else 1)
            for piece in one.pieces:
                said = tokenizer.hf.decode(piece.ids)
                assert TEXT.strip() in said
                assert "{" not in said
                assert piece.asked.scoring == task.questions.scoring  # type: ignore[union-attr]
                assert piece.context == (len(piece.ids) - 1 if known == "known" else piece.asked.asked_at)
                perfect = " ".join(piece.asked.references[:1])
                if piece.asked.scoring == "choice_sentence":
                    perfect = f"The correct answer is ({perfect})"
                assert SCORING[piece.asked.scoring](perfect, piece.asked.references) == pytest.approx(1)
                assert SCORING[piece.asked.scoring]("", piece.asked.references) == 0


def test_the_middle_of_a_long_prompt_is_cut_out(tmp_path: Path, tokenizer: Tokenizer) -> None:
    task = load_task("longbench-hotpotqa")
    rows = [{**row(task, i), "context": " ".join(f"Fact {n} is {n * 7}." for n in range(300))} for i in range(2)]
    path = written(tmp_path / "rows.jsonl", rows)
    rules = task.questions
    assert rules is not None
    prompt = (rules.context + rules.question).replace("{context}", rows[0]["context"])
    ids = tokenizer.hf(prompt.replace("{input}", "Who kept it?"), add_special_tokens=False).input_ids
    for known in ("hidden", "known"):
        for _, one in cut(task, path, tokenizer, question=known):
            piece = one.pieces[0]
            room = 400 - 32
            assert one.dropped == len(ids) - room
            assert list(piece.ids) == [*ids[: room // 2], *ids[len(ids) - room + room // 2 :]]
            question = tokenizer.hf.decode(piece.ids[-30:])
            assert "Question: Who kept it?" in question
            assert piece.context == (room - 1 if known == "known" else piece.asked.asked_at - one.dropped)
    with pytest.raises(UserError, match="too few"):
        cut(load_task("longbench-gov-report"), path, tokenizer, length="520")


def test_several_questions_about_a_cut_context_see_the_same(tmp_path: Path, tokenizer: Tokenizer) -> None:
    task = load_task("scbench-kv")
    turns = [{"input": f"What is key {'very ' * n}{n}?", "answer": str(n)} for n in range(3)]
    path = written(tmp_path / "rows.jsonl", [{"context": TEXT * 60, "multi_turns": turns}])
    (_, one), = cut(task, path, tokenizer)
    contexts = {piece.ids[: piece.context] for piece in one.pieces}
    assert len(contexts) == 1
    assert max(len(piece.ids) for piece in one.pieces) == 400 - 150


@pytest.mark.parametrize(("change", "said"), [
    ({"input": None}, 'line 2: the "input" is not a text'),
    ({"answers": []}, 'line 2: the "answers" is not a text, a number, or a list'),
    ({"answers": [{"a": 1}]}, 'line 2: the "answers" is not'),
    ({"answers": ""}, 'line 2: the "answers" is not'),
    ({"answers": '["a", "b"]'}, 'line 2: the "answers" is not an answer, but the text of a list'),
    ({"all_classes": None}, 'line 2: the "all_classes" is not a list of all labels'),
    ({"context": 7.5, "input": ["x"]}, 'line 2: the "input" is not a text'),
    ({"context": "half \ud800"}, "line 2"),
])
def test_bad_rows_are_refused_with_their_line(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    task = load_task("longbench-trec")
    rows = [row(task, 0), {**row(task, 1), **change}]
    with pytest.raises(UserError, match=said.replace("(", r"\(")):
        load_corpus(task, written(tmp_path / "rows.jsonl", rows))


def test_missing_columns_and_turns_are_refused(tmp_path: Path) -> None:
    task = load_task("scbench-choice-eng")
    good = row(task, 0)
    for bad, said in (
        ({"context": TEXT}, 'line 2: the row has no "multi_turns"'),
        ({**good, "multi_turns": []}, 'line 2: the "multi_turns" is not a list of questions'),
        ({**good, "multi_turns": [{"input": "x", "options": ["y"] * 4}]}, 'line 2: the row has no "answer"'),
        ({**good, "multi_turns": [{"input": "x", "answer": "A", "options": ["y"]}]}, 'the "options" is not a list of'),
        ({**good, "multi_turns": [{"input": "x", "answer": "n", "options": ["y"] * 4}]}, 'the "answer" is not one of'),
        (
            {**good, "multi_turns": [{"input": "x", "answer": "29", "options": [str(n) for n in range(30)]}]},
            'the "answer" is not one of the "options", which are 26 at most',
        ),
    ):
        with pytest.raises(UserError, match=said):
            load_corpus(task, written(tmp_path / "rows.jsonl", [good, bad]))
    number = load_task("infinitebench-math-find")
    with pytest.raises(UserError, match='line 1: the "answer" is not a number'):
        load_corpus(number, written(tmp_path / "rows.jsonl", [{"context": "x", "input": "y", "answer": ["abc"]}]))
    (tmp_path / "plain.txt").write_text("a text")
    for plain in (tmp_path / "plain.txt", tmp_path):
        with pytest.raises(UserError, match="is plain text"):
            load_corpus(number, plain)
    with pytest.raises(UserError, match="holds no question"):
        load_corpus(load_task("ruler-qa"), written(tmp_path / "none.jsonl", [
            {"context": TEXT, "question": "Who?", "answers": {"text": [], "answer_start": []}}
        ]))


@pytest.mark.parametrize(("rule", "answer", "references", "score"), [
    ("qa_f1", "It was the Keeper, of Anselm.", ("keeper anselm",), 2 * 2 / (5 + 2)),
    ("qa_f1", "An apple a day", ("the day", "apple"), 2 / 3),
    ("classification", "Type: Place", ("Place", "Person", "Number"), 1.0),
    ("classification", "Place or Person", ("Place", "Person", "Number"), 0.5),
    ("classification", "Place name", ("Place name", "Place", "name"), 1.0),
    ("classification", "Person", ("Place", "Person"), 0.0),
    ("number_share", "Paragraph 12, or 3", ("Paragraph 12",), 0.5),
    ("number_share", "twelve", ("12",), 0.0),
    ("code_similarity", "```\n# sum\nreturn a + b\n", ("return a + b",), 1.0),
    ("code_similarity", "abcd\nrest", ("abce",), 0.75),
    ("choice_sentence", "**The correct answer is (C)**", ("C",), 1.0),
    ("choice_sentence", "The correct answer is D", ("C",), 0.0),
    ("choice_sentence", "C", ("C",), 0.0),
    ("choice_letter", "B. the harbour", ("the harbour", "B"), 1.0),
    ("choice_letter", "I think the answer is: C", ("C",), 1.0),
    ("choice_letter", "It can only be D here", ("C", "text"), 0.0),
    ("first_value", "It is 12.5.", ("12.5",), 1.0),
    ("first_value", "12", ("12.0",), 1.0),
    ("last_number", "The value is: -42.", ("-42",), 1.0),
    ("last_number", "42 it is", ("42",), 0.0),
    ("last_number", "it is --5", ("5",), 0.0),
    ("last_number", "it is +5", ("5",), 1.0),
    ("contains_exactly", "Abc", ("abc",), 0.0),
    ("label_published", "Animal C) <example> kitchen", ("kitchen", "garden"), 0.0),
    ("contains_any", "ABC-1", ("abc-1", "x"), 1.0),
])
def test_scoring_by_worked_examples(rule: str, answer: str, references: tuple[str, ...], score: float) -> None:
    assert SCORING[rule](answer, references) == pytest.approx(score)


def test_rouge_is_that_of_the_packages() -> None:
    said, right = "the cat sat on the mat. it was warm.", "the cat lay on the mat. it was cold."
    package = Rouge().get_scores(said, right)[0]["rouge-l"]["f"]
    assert qa_scoring.rouge_l(said, ["nothing", right]) == pytest.approx(package)
    assert qa_scoring.rouge_lsum(said, [right]) == pytest.approx(7 / 9)  # seven of nine words in order on both sides
    assert qa_scoring.rouge_l("...", [right]) == 0


@pytest.mark.parametrize(
    "rules", ['scoring = "best"', 'question = "{input.x}"', 'question = "{0!r}"', "new_tokens = 0"]
)
def test_bad_rules_are_refused(rules: str, tmp_path: Path) -> None:
    lines = {
        "context": 'context = "{context}"', "question": 'question = "{input}"', "scoring": 'scoring = "qa_f1"',
        "new_tokens": "new_tokens = 8",
    }
    lines[rules.split(" ", maxsplit=1)[0]] = rules
    path = tmp_path / "mine.toml"
    path.write_text(
        'name = "mine"\nversion = 1\nsummary = "x"\nkind = "questions"\nprotocols = ["answer"]\n'
        '[corpus]\nhub = "a/b"\ncut = "questions"\n[questions]\n' + "\n".join(lines.values())
    )
    with pytest.raises(UserError):
        load_task(str(path))


def test_rows_of_the_hub_are_read_alike(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    task = load_task("longbench-trec")
    rows = [row(task, number) for number in range(3)]
    asked: list[Any] = []

    def load_dataset(*args: Any, **options: Any) -> datasets.Dataset:
        asked.append((args, options["split"]))
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    ours, theirs = load_corpus(task, None), load_corpus(task, written(tmp_path / "rows.jsonl", rows))
    assert asked == [(("Xnhyacinth/LongBench", "trec"), "test")]
    assert ours.documents == theirs.documents
    assert ours.hash == theirs.hash


def test_classes_in_the_question_count(tmp_path: Path) -> None:
    rows = [{**row(load_task("longbench-trec"), 0), "input": "Which Place?", "answers": ["Person"]}]
    corpus = load_corpus(load_task("longbench-trec"), written(tmp_path / "rows.jsonl", rows))
    sample = corpus.documents[0].sample
    assert sample is not None
    assert SCORING["classification"]("Place Person", sample.questions[0].references) == 0.5


def test_a_template_that_writes_the_bos_gets_no_other(tiny_tokenizer: Any, tmp_path: Path) -> None:
    task = load_task("longbench-hotpotqa")
    path = written(tmp_path / "rows.jsonl", [row(task, 0)])
    hf = copy.deepcopy(tiny_tokenizer)
    bos = 0
    hf.chat_template = hf.decode([bos]) + "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|a|>"
    for template, known in (("auto", "hidden"), ("auto", "known"), ("none", "hidden")):
        protocol = QuestionRows.resolve(task, {**OPTIONS, "template": template, "question": known}, 1024, "tiny")
        [(_, one)] = protocol.pieces(load_corpus(task, path).documents, Tokenizer(hf, bos), 0, False)
        assert one.pieces[0].ids[0] == bos
        assert one.pieces[0].ids[1] != bos


def test_results_shown_and_reported(tmp_path: Path, called: Call) -> None:
    task = load_task("longbench-hotpotqa")
    path = written(tmp_path / "rows.jsonl", [row(task, number) for number in range(2)])
    for length in (300, 400):
        asked = ["run", "--task", task.name, "--data", path, "--method", "knorm", "--ratio", "0.5", "--no-baselines",
                 "--set", "question=hidden", "--set", f"length={length}", "--out", tmp_path / str(length), "--json"]
        found = called(asked)
        assert found.code == 0, found.err
        rows = json.loads(found.out)["rows"]
        assert {r["params"]["context_length"] for r in rows} == {length}
    assert called(["show", tmp_path / "300"]).code == 0
    found = called(["report", tmp_path / "300", tmp_path / "400", "--out", tmp_path / "report"])
    assert found.code == 0, found.err
    assert "length 300" in found.out
    assert "length 400" in found.out
