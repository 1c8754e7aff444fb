"""Samples of long-context tasks: what they hold is counted again here, from their text alone."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from kvbench.data.documents import embedded_documents, load_corpus
from kvbench.data.samples.documents import DocumentQuestion
from kvbench.data.samples.lists import CommonWords, FrequentWords, VariableTracking
from kvbench.data.samples.lookup import KeyValues, PassKey
from kvbench.data.samples.needles import NeedleGrid, Needles
from kvbench.data.samples.orders import Instructions
from kvbench.data.samples.sample import EVIDENCE, Filler, Recipe, Sample, make_sample
from kvbench.data.samples.scoring import SCORING, followed
from kvbench.data.samples.stories import GIVERS, OBJECTS, PEOPLE, ROOMS, Story
from kvbench.data.samples.sums import Arithmetic
from kvbench.data.tasks import load_task
from kvbench.errors import UserError

RECIPES: dict[str, Recipe] = {
    "single_1": Needles("noise"), "single_2": Needles(), "single_3": Needles(value="uuids"),
    "multikey_1": Needles(keys=4), "multikey_2": Needles("needle"), "multikey_3": Needles("needle", "uuids", "uuids"),
    "multivalue": Needles(values=4), "multiquery": Needles(asked=4), "grid": NeedleGrid(), "vt": VariableTracking(),
    "vt2": VariableTracking(chains=2), "cwe": CommonWords(), "fwe": FrequentWords(), "passkey": PassKey(),
    "kv": KeyValues(), "instructions": Instructions(), "arithmetic": Arithmetic(),
    "docqa": DocumentQuestion(),
    **{f"babi_{task}": Story(task=task) for task in (1, 2, 3, 4, 5)},  # type: ignore[arg-type]
}
LENGTH = 1400
"""Tokens of a sample whose length is looked at."""
WORDS = 1000
"""Words of the others: counted so, a sample is found in a fraction of the time."""
Make = Callable[..., Sample]


def words(sample: Sample) -> int:
    return max(len((sample.context + one.text).split()) for one in sample.questions)


@pytest.fixture(scope="module")
def filler() -> Filler:
    asked = load_corpus(load_task("docqa"), None).documents
    return Filler(
        [document.text for document in embedded_documents()],
        [document.sample for document in asked if document.sample is not None],
    )


@pytest.fixture(scope="module")
def count(tiny_tokenizer: Any) -> Callable[[Sample], int]:
    def counted(sample: Sample) -> int:
        return max(
            len(tiny_tokenizer(sample.context + one.text + one.prefix).input_ids) + one.new_tokens
            for one in sample.questions
        )

    return counted


@pytest.fixture(scope="module")
def make(filler: Filler) -> Make:
    def made(
        name: str, index: int = 0, seed: int = 0, length: int = WORDS, count: Callable[[Sample], int] = words
    ) -> Sample:
        return make_sample(RECIPES[name].prepare(length), filler, length, seed, index, count)

    return made


@pytest.mark.parametrize("name", RECIPES)
def test_lengths_are_met_and_answers_are_in_the_prompt(
    make: Make, count: Callable[[Sample], int], name: str
) -> None:
    # Tokens of one unit, at most.
    units = {"docqa": 260, "kv": 110, "multikey_3": 110, "fwe": 60, "cwe": 40, "arithmetic": 60}
    for index in range(4):
        sample = make(name, index, length=LENGTH, count=count)
        assert LENGTH - units.get(name, 50) < count(sample) <= LENGTH
        for question in sample.questions:
            whole = sample.context + question.text
            right = question.references[:1] if question.scoring in ("label", "contains_any") else question.references
            if question.scoring == "instructions":
                right = tuple(one.partition(":")[2] for one in right)
            if name != "arithmetic":
                assert all(reference.lower() in whole.lower() for reference in right)
            best = " ".join(right)
            if question.scoring != "instructions":
                assert SCORING[question.scoring](best, question.references) == 1
        for span in sample.spans:
            assert 0 <= span.start < span.stop <= len(sample.context)


@pytest.mark.parametrize("name", RECIPES)
def test_every_seed_has_samples_of_its_own_and_always_the_same(make: Make, name: str) -> None:
    length = 700
    made = [make(name, 0, seed, length) for seed in range(10)]
    made += [make(name, index, 0, length) for index in range(1, 11)]
    assert len({(sample.context, sample.questions) for sample in made}) == 20
    assert make(name, 3, 0, length) == make(name, 3, 0, length)


def test_samples_are_the_same_on_every_machine(filler: Filler) -> None:
    """By words, so that no tokenizer is part of it."""
    samples = [make_sample(recipe.prepare(500), filler, 500, 0, 1, words) for recipe in RECIPES.values()]
    content = "\n".join(
        str((made.context, [(one.text, one.prefix, one.references) for one in made.questions], made.spans))
        for made in samples
    )
    assert hashlib.sha256(content.encode()).hexdigest()[:16] == "4249cf245cc69941"


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if isinstance(recipe, Needles)])
def test_needles_are_as_many_as_said_and_the_question_is_worded_for_them(make: Make, name: str) -> None:
    recipe, sample = RECIPES[name], make(name)
    assert isinstance(recipe, Needles)
    [question] = sample.questions
    found = re.findall(r"One of the special magic (\w+) for (\S+) is: (\S+)\.(?=\s|$)", sample.context)
    asked = re.split(r", and |, ", question.text.split(" for ", 1)[1].split(" mentioned")[0])
    assert [kind for kind, _, _ in found] == [recipe.value] * len(found)
    if recipe.haystack != "needle":
        assert len(found) == max(recipe.keys, recipe.asked) * recipe.values
    held: dict[str, set[str]] = {}
    for _, key, value in found:
        held.setdefault(key, set()).add(value)
    assert len(asked) == recipe.asked
    assert set().union(*(held[key] for key in asked)) == set(question.references)
    spans = [sample.context[span.start : span.stop] for span in sample.spans if span.name == EVIDENCE]
    assert sorted(spans) == sorted(
        f"One of the special magic {kind} for {key} is: {value}." for kind, key, value in found if key in asked
    )
    one = len(question.references) == 1
    assert question.text.startswith("\nWhat is the special" if one else "\nWhat are all the special")
    assert question.prefix.endswith(" is" if one else " are")
    assert sample.context.startswith("A special magic" if one else "Some special magic")


def test_needles_of_the_grid_are_at_the_depths_said(make: Make) -> None:
    for index in range(10):
        sample = make("grid", index)
        [span] = sample.spans
        body = sample.context.split("\n", 1)[1]
        start = span.start - (len(sample.context) - len(body))
        depth, said = len(body[:start].split()) / (len(body.split()) - 9), int(sample.bin.removeprefix("depth="))
        assert said == round(100 * index / 9)
        assert -0.05 <= depth - said / 100 <= 0.001  # moved back to where a sentence begins


def test_variables_are_those_that_hold_the_value(make: Make) -> None:
    for name in ("vt", "vt2"):
        sample = make(name)
        [question] = sample.questions
        lines = [line.strip() for line in sample.context.split("\n\n")[-1].split("\n")]
        held: dict[str, str] = {}
        for line in lines:
            if line.startswith("VAR"):
                left, right = line.removeprefix("VAR ").split(" = ")
                held[left] = held[right.removeprefix("VAR ")] if right.startswith("VAR") else right
        value = re.search(r"value (\d+)", question.text)
        assert value is not None
        assert {key for key, number in held.items() if number == value[1]} == set(question.references)
        assert len(held) == 5 * (2 if name == "vt2" else 1)
        assert "The grass is green" in sample.context


def test_common_and_frequent_words_are_counted(make: Make) -> None:
    sample = make("cwe")
    text = sample.context.rsplit("appear most often.\n", 1)[1]
    counts = Counter(re.findall(r"\d+\. (\S+)", text))
    assert {word for word, _ in counts.most_common(10)} == set(sample.questions[0].references)
    assert set(counts.values()) == {6, 1}  # below 4096 tokens
    sample = make("fwe")
    counts = Counter(sample.context.split("coded words. ")[1].split())
    ranks = counts.most_common(4)
    assert ranks[0][0] == "..."
    assert [word for word, _ in ranks[1:]] == list(sample.questions[0].references)
    assert ranks[3][1] > counts.most_common(5)[4][1]


def test_values_are_those_of_the_object(make: Make) -> None:
    sample = make("kv")
    held = json.loads(sample.context.split("\n\n", 1)[1])
    assert len(sample.questions) == 4
    for question in sample.questions:
        key = question.text.split('"')[1]
        assert question.references == (held[key],)


def test_sums_are_right(make: Make) -> None:
    def left(problem: str) -> int:
        first, more, less = map(int, re.findall(r"\d+", problem))
        return first + more - less

    sample = make("arithmetic")
    assert left(sample.questions[0].text) == int(sample.questions[0].references[0])
    for problem, answer in re.findall(r"Question: (.*)\nAnswer: (-?\d+)", sample.context):
        assert left(problem) == int(answer)


def told(sample: Sample) -> list[str]:
    """The sentences of a story, found by the people and rooms in them."""
    words = {*PEOPLE, *GIVERS, *ROOMS}
    text = sample.context.split("\n\n", 1)[1]
    facts = [sample.context[span.start : span.stop] for span in sample.spans]
    way, deed = r"The \w+ is (north|south|east|west) of the \w+", r"\w+ \w+( up| down)? (to )?the \w+( to \w+)?"
    known = re.finditer(rf"({way}|{deed})\.", text)
    found = [one[0] for one in known if set(re.findall(r"\w+", one[0])) & words]
    assert found == facts
    return facts


def answer(task: int, story: list[str], question: str) -> str:
    """The answer to a question, by a reader of sentences that shares nothing with the simulator."""
    if task == 4:
        return beside(story, question)
    if task == 5:
        return given(story, question)
    room: dict[str, str] = {}
    carries: dict[str, str] = {}
    been: dict[str, list[str]] = {thing: [] for thing in OBJECTS}
    for sentence in story:
        words = sentence.rstrip(".").split()
        who, thing = words[0], words[-1]
        if thing in ROOMS:
            room[who] = thing
            for carried in [one for one, by in carries.items() if by == who]:
                been[carried].append(thing)
        elif words[1] in ("took", "grabbed", "picked"):
            carries[thing] = who
            been[thing] = been[thing] or [room[who]]
            assert been[thing][-1] == room[who], "nobody takes a thing that is elsewhere"
        else:
            assert carries.pop(thing) == who
    asked = re.findall(r"\w+", question)
    if task == 3:
        rooms = been[asked[3]]
        return rooms[rooms.index(asked[-1]) - 1]
    return room[asked[-1]] if task == 1 else been[asked[-1]][-1]


def beside(story: list[str], question: str) -> str:
    answers = {}
    for sentence in story:
        _, one, _, way, _, _, other = sentence.rstrip(".").split()
        answers |= {f"What is {way} of the {other}?": one, f"What is the {one} {way} of?": other}
    return answers[question]


def given(story: list[str], question: str) -> str:
    gifts = [(words[0], words[3], words[5]) for words in (sentence.rstrip(".").split() for sentence in story)]
    patterns = (r"Who gave the (\w+) to (\w+)", r"What did (\w+) give to (\w+)", r"Who did (\w+) give the (\w+) to")
    [(place, known)] = [
        (place, match.groups()) for place, pattern in enumerate(patterns) for match in [re.search(pattern, question)]
        if match
    ]
    [found] = {
        gift[place] for gift in gifts if tuple(part for number, part in enumerate(gift) if number != place) == known
    }
    return found


@pytest.mark.parametrize("task", [1, 2, 3, 4, 5])
def test_stories_are_true(make: Make, task: int) -> None:
    for index in range(25):
        sample = make(f"babi_{task}", index, length=350)
        [question] = sample.questions
        asked = question.text.removeprefix("\n\nQuestion: ")
        assert answer(task, told(sample), asked) == question.references[0], (told(sample), asked)


def test_scoring_by_worked_examples() -> None:
    rules = SCORING
    assert rules["contains_all"]("It is 12 and\n34.", ["12", "34", "56"]) == pytest.approx(2 / 3)
    assert rules["contains_all"]("QUIET-River", ["quiet-river"]) == 1
    assert rules["contains_any"]("the Nile", ["Amazon", "nile"]) == 1
    assert rules["first_number"](" 1,234 or 99", ["1234"]) == 1
    assert rules["first_number"]("12 and 34", ["34"]) == 0
    assert rules["first_number"]("none", ["34"]) == 0
    assert rules["label"]("In the garden. Or the kitchen.", ["garden", "kitchen"]) == 1
    assert rules["label"]("garden or kitchen", ["garden", "kitchen"]) == 0
    assert rules["label"]("Yes, I know", ["yes", "no"]) == 1
    assert rules["label_published"]("Yes, I know", ["yes", "no"]) == 0
    assert rules["label"]("none", ["none", "one"]) == 1
    assert rules["label_published"]("none", ["none", "one"]) == 0
    assert followed("Lake water is blue", "begins:lake")
    assert followed("Blue is the Lake.", "ends:lake")
    assert followed("a quiet lake", "lower:")
    assert not followed("A lake", "lower:")
    assert followed("a lake", "without:q")
    assert not followed("", "without:q")
    assert not followed("lakes", "contains:lake")
    assert rules["instructions"]("a lake", ["contains:lake", "ends:river"]) == 0.5


def test_a_length_that_is_too_short_is_a_sentence(make: Make) -> None:
    with pytest.raises(UserError, match="too few for a sample"):
        make("single_1", length=100)


def test_documents_are_those_of_the_set_each_once_and_the_right_one_is_among_them(make: Make, filler: Filler) -> None:
    contexts = {sample.context: sample.questions[0] for sample in filler.samples}
    asked = set()
    for index in range(30):
        sample = make("docqa", index)
        found = re.split(r"Document \d+:\n", sample.context)[1:]
        texts = [text.strip() for text in found]
        assert set(texts) <= set(contexts)
        assert len(set(texts)) == len(texts) > 3
        [(name, start, stop)] = sample.spans
        evidence = sample.context[start:stop].split(":\n", 1)[1].strip()
        right = contexts[evidence]
        assert name == EVIDENCE
        assert right.text in sample.questions[0].text
        assert right.references == sample.questions[0].references
        others = [text for text in texts if text != evidence]
        assert not any(answer.lower() in text.lower() for answer in right.references for text in others)
        asked.add(right.text)
    assert len(asked) == 30  # no question twice while there are others
