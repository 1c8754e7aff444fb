"""The facts that texts state and questions ask for, in training and in the ``recall`` task."""

from __future__ import annotations

NAMES = (
    "Mary", "John", "Anna", "Peter", "Alice", "Henry", "Ruth", "Paul", "Clara", "James",
    "Lucy", "Robert", "Emma", "David", "Jane", "Thomas", "Sarah", "George", "Martha", "William",
)
THINGS = ("key", "room", "house", "number", "ticket", "box", "letter", "book")
FACT_LOW, FACT_HIGH = 100, 9999


def fact(thing: str, name: str, number: int) -> str:
    """The sentence that states a fact, the same in training and in the ``recall`` task."""
    return f"\n\nThe {thing} of {name} is {number}.\n\n"
