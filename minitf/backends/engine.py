"""What the engines of the cpu and cuda backends are to a decoder."""

from torch import Tensor

from minitf.backends.token_future import Arrival


class Step:
    """Reads a few tokens into a decoder's cache, from its `length` on, which the decoder advances."""

    finds_likeliest = False  # whether it has `likeliest`, which takes less time than to choose from logits

    def __call__(self, ids_BT: Tensor) -> Tensor:
        """Logits_BV of what comes after ids_BT."""
        raise NotImplementedError

    def likeliest(self, ids_BT: Tensor) -> Arrival:
        """The ids with the largest of these logits alone; MinitfError, now or on arrival, if any is not finite."""
        raise NotImplementedError

    def forget(self) -> None:
        """Others have written to the cache: what was found ahead of its `length` is of another text."""
