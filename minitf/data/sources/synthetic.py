"""Generated pairs with known answers, for learning and for testing what a model can do: copy, reverse, sort, addition.

Every pair is made once: what is held out is never trained on. The same seed gives the same pairs.
"""

import random
import string
from collections.abc import Callable, Iterator

EXERCISES = {
    "copy": "letters, given back",
    "reverse": "letters, given back from the last to the first",
    "sort": "letters, given back in alphabetical order",
    "addition": "two numbers of three digits and their sum",
}
MOST_PAIRS = 500_000  # of the 810,000 sums there are
LETTERS = (4, 12)  # fewest and most letters of a prompt
SEED = 0


def exercise_pairs(name: str, num_pairs: int) -> Iterator[tuple[str, str]]:
    """`num_pairs` different pairs (prompt, completion) of the exercise `name`, one of EXERCISES."""
    make = _MAKERS[name]
    rng = random.Random(f"{name} {SEED}")  # a string, whose hash as a seed is the same everywhere
    seen: set[str] = set()
    while len(seen) < num_pairs:
        prompt, completion = make(rng)
        if prompt not in seen:
            seen.add(prompt)
            yield prompt, completion


def _letters(rng: random.Random) -> str:
    return "".join(rng.choices(string.ascii_lowercase, k=rng.randint(*LETTERS)))


def _copy(rng: random.Random) -> tuple[str, str]:
    text = _letters(rng)
    return text, text


def _reverse(rng: random.Random) -> tuple[str, str]:
    text = _letters(rng)
    return text, text[::-1]


def _sort(rng: random.Random) -> tuple[str, str]:
    text = _letters(rng)
    return text, "".join(sorted(text))


def _addition(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randrange(100, 1000), rng.randrange(100, 1000)
    return f"{a}+{b}", str(a + b)


_MAKERS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "copy": _copy,
    "reverse": _reverse,
    "sort": _sort,
    "addition": _addition,
}
