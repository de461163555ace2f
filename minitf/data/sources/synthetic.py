"""Generated pairs with known answers, for learning and for testing what a model can do: copy, reverse, sort, addition.

Every pair is generated once, so that no held-out pair is trained on. The same seed gives the same pairs.
"""

import random
import string
from collections.abc import Iterator

EXERCISES = {
    "copy": "letters, given back",
    "reverse": "letters, given back from the last to the first",
    "sort": "letters, given back in alphabetical order",
    "addition": "two numbers of three digits and their sum",
}
MAX_PAIRS = 500_000  # of the 810,000 sums there are
LETTERS = (4, 12)  # fewest and most letters of a prompt
SEED = 0


def exercise_pairs(name: str, num_pairs: int) -> Iterator[tuple[str, str]]:
    """`num_pairs` different pairs (prompt, completion) of the exercise `name`, one of EXERCISES."""
    rng = random.Random(f"{name} {SEED}")  # a string, whose hash as a seed is the same everywhere
    seen: set[str] = set()
    while len(seen) < num_pairs:
        prompt, completion = _pair(name, rng)
        if prompt not in seen:
            seen.add(prompt)
            yield prompt, completion


def _pair(name: str, rng: random.Random) -> tuple[str, str]:
    if name == "addition":
        a, b = rng.randrange(100, 1000), rng.randrange(100, 1000)
        return f"{a}+{b}", str(a + b)
    letters = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(*LETTERS)))
    return letters, {"copy": letters, "reverse": letters[::-1], "sort": "".join(sorted(letters))}[name]
