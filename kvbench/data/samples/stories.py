"""Stories of people who move and carry things, among other text: the first five tasks of bAbI (1502.05698), scattered
as in BABILong (2406.10149). The simulator, its words and the filler are our own."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import Literal

from kvbench.data.samples.sample import EVIDENCE, Filler, Question, Recipe, Sample, joined

PEOPLE = ("Mary", "John", "Daniel", "Sandra")
GIVERS = ("Mary", "Fred", "Jeff", "Bill")
ROOMS = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
OBJECTS = ("apple", "football", "milk")
WAYS = {"north": "south", "south": "north", "east": "west", "west": "east"}
GOES = ("went to", "moved to", "travelled to", "journeyed to")
EXAMPLES = {
    1: "Sandra went to the garden. Mary moved to the office. Where is Sandra? garden",
    2: "John moved to the kitchen. John took the apple. John went to the office. Where is the apple? office",
    3: "Mary took the milk. Mary went to the kitchen. Mary moved to the garden. "
       "Where was the milk before the garden? kitchen",
    4: "The office is north of the bedroom. What is north of the bedroom? office",
    5: "Fred gave the football to Bill. Who did Fred give the football to? Bill",
}
FACT = "fact"


@dataclass
class World:
    """Where everyone and everything is, and the sentences that said so."""

    random: Random
    room: dict[str, str] = field(default_factory=dict)
    holder: dict[str, str] = field(default_factory=dict)
    been: dict[str, list[tuple[str, int, int]]] = field(default_factory=dict)
    """Of each object: the rooms it was in, and the sentences by which it came there (who moved, who took it)."""
    story: list[str] = field(default_factory=list)
    moved: dict[str, int] = field(default_factory=dict)
    taken: dict[str, int] = field(default_factory=dict)

    def move(self) -> None:
        who = self.random.choice(PEOPLE)
        room = self.random.choice([room for room in ROOMS if room != self.room.get(who)])
        self.room[who], self.moved[who] = room, len(self.story)
        self.story.append(f"{who} {self.random.choice(GOES)} the {room}.")
        for thing, holder in self.holder.items():
            if holder == who:
                self._came(thing)

    def take(self) -> None:
        """Someone who is in a room takes a thing that nobody holds and that is there, or has not been seen yet."""
        free = [thing for thing in OBJECTS if thing not in self.holder]
        able = [
            (who, thing) for thing in free for who in PEOPLE
            if who in self.room and (thing not in self.been or self.been[thing][-1][0] == self.room[who])
        ]
        if able:
            who, thing = self.random.choice(able)
            self.holder[thing], self.taken[thing] = who, len(self.story)
            self.story.append(f"{who} {self.random.choice(('took', 'grabbed', 'picked up'))} the {thing}.")
            if thing not in self.been:
                self._came(thing)

    def drop(self) -> None:
        if self.holder:
            thing = self.random.choice(sorted(self.holder))
            who = self.holder.pop(thing)
            self.story.append(f"{who} {self.random.choice(('dropped', 'left', 'put down'))} the {thing}.")

    def _came(self, thing: str) -> None:
        who = self.holder[thing]
        self.been.setdefault(thing, []).append((self.room[who], self.moved[who], self.taken[thing]))


@dataclass(frozen=True)
class Story(Recipe):
    """Facts in their order, scattered over running text, and a question about them.

    Attributes:
        task: 1 where someone is, 2 where a thing is, 3 where it was before, 4 what lies beside what, 5 who gave what.
        published: score by the rule of BABILong instead of by whole words.
    """

    name = "story"
    step = 30

    task: Literal[1, 2, 3, 4, 5] = 1
    published: bool = False

    def sample(self, units: int, random: Random, filler: Filler, index: int) -> Sample:
        story, question, answer, evidence = {4: _directions, 5: _gifts}.get(self.task, self._moves)(random)
        hay = filler.sentences(units)
        places = sorted(random.randint(0, len(hay)) for _ in story)
        facts = [(text, EVIDENCE if place in evidence else FACT) for place, text in enumerate(story)]
        parts: list[tuple[str, str]] = []
        for number in range(len(hay) + 1):
            parts += [fact for place, fact in zip(places, facts, strict=True) if place == number]
            parts += [(sentence, "") for sentence in hay[number : number + 1]]
        before = (
            "The text below tells a story, hidden among other sentences. Answer the question about the story with one "
            f"word.\nExample: {EXAMPLES[self.task]}\n\n"
        )
        context, spans = joined(parts, " ", before)
        known = (*ROOMS,) if self.task != 5 else (*GIVERS, *OBJECTS)
        others = [one for one in known if one != answer and one.lower() not in question.lower()]
        rule = "label_published" if self.published else "label"
        return Sample(
            context, (Question(f"\n\nQuestion: {question}", "\nAnswer:", (answer, *others), rule, 12),), spans
        )

    def _moves(self, random: Random) -> tuple[list[str], str, str, set[int]]:
        while True:
            world = World(random)
            steps = {1: (World.move,), 2: (World.move, World.move, World.take, World.drop)}
            for _ in range(random.randint(6, 10) if self.task == 1 else random.randint(10, 16)):
                random.choice(steps.get(self.task, steps[2]))(world)
            if self.task == 1:
                who = random.choice(sorted(world.room))
                return world.story, f"Where is {who}?", world.room[who], {world.moved[who]}
            things = [thing for thing, been in world.been.items() if self.task == 2 or _is_clear(been)]
            if things:
                return self._asked(world, random.choice(sorted(things)))

    def _asked(self, world: World, thing: str) -> tuple[list[str], str, str, set[int]]:
        been = world.been[thing]
        last, moved, taken = been[-1]
        if self.task == 2:
            return world.story, f"Where is the {thing}?", last, {moved, taken}
        before, moved_before, taken_before = been[-2]
        question = f"Where was the {thing} before the {last}?"
        return world.story, question, before, {moved, taken, moved_before, taken_before}


def _is_clear(been: list[tuple[str, int, int]]) -> bool:
    """Whether a thing was in its last room once only, and in another before."""
    return len(been) > 1 and [room for room, _, _ in been].count(been[-1][0]) == 1


def _directions(random: Random) -> tuple[list[str], str, str, set[int]]:
    one, two, three = random.sample(ROOMS, 3)
    first, second = random.sample(sorted(WAYS), 2)
    story = [f"The {one} is {first} of the {two}.", f"The {two} is {second} of the {three}."]
    place = random.randint(0, 1)
    upper, way, lower = ((one, first, two), (two, second, three))[place]
    asked = random.choice((0, 1))
    question = f"What is {way} of the {lower}?" if asked else f"What is the {upper} {way} of?"
    random.shuffle(order := [0, 1])
    return [story[number] for number in order], question, upper if asked else lower, {order.index(place)}


def _gifts(random: Random) -> tuple[list[str], str, str, set[int]]:
    story, gifts = [], []
    owner = {thing: random.choice(GIVERS) for thing in OBJECTS}
    for _ in range(random.randint(4, 8)):
        thing = random.choice(OBJECTS)
        giver = owner[thing]
        owner[thing] = random.choice([one for one in GIVERS if one != giver])
        gifts.append((giver, thing, owner[thing]))
        story.append(f"{giver} {random.choice(('gave', 'handed', 'passed'))} the {thing} to {owner[thing]}.")
    place = random.randrange(len(gifts))
    giver, thing, to = gifts[place]
    asked = random.randrange(3)
    question = (f"Who gave the {thing} to {to}?", f"What did {giver} give to {to}?",
                f"Who did {giver} give the {thing} to?")[asked]
    known = [[part for number, part in enumerate(gift) if number != asked] for gift in gifts]
    if known.count(known[place]) > 1:  # the question would have several answers
        return _gifts(random)
    return story, question, gifts[place][asked], {place}
