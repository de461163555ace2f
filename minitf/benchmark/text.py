"""Synthetic text of any size."""

from pathlib import Path

LETTERS = "etaoinshrdlucmwfgypbvk"
BLOCK_WORDS = 180_000  # about a megabyte


def write_text(path: Path, num_bytes: int, seed: int = 0) -> Path:
    """Write `num_bytes` of text whose random words have the frequencies of real ones (Zipf's law)."""
    import numpy as np

    rng = np.random.default_rng(seed)
    frequency = 1 / np.arange(1, len(LETTERS) + 1) ** 0.7
    words = [
        "".join(rng.choice(list(LETTERS), size=length, p=frequency / frequency.sum()))
        for length in rng.integers(2, 10, size=20_000)
    ]
    forms = np.array(
        [form for word in words for form in (word, word, word, word.capitalize(), word + ",", word + ".\n")]
    )
    chances = np.repeat(1 / np.arange(1, len(words) + 1), len(forms) // len(words))
    cumulative = (chances / chances.sum()).cumsum()
    left = num_bytes
    with path.open("w", encoding="ascii") as file:
        while left > 0:
            taken = cumulative.searchsorted(rng.random(BLOCK_WORDS)).clip(max=len(forms) - 1)
            block = " ".join(forms[taken])[:left]
            file.write(block)
            left -= len(block)
    return path
