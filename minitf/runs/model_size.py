"""The size of the model that a run trains if none is set (`model=auto`)."""

from collections.abc import Mapping
from dataclasses import dataclass

from minitf.model import ModelConfig, Transformer
from minitf.training.flops import flops_per_token
from minitf.training.trainer_config import TrainerConfig

# A model pays for its size if it sees as many tokens as it has parameters, even if a short text is repeated for that:
# see benchmark/log.md, 2026-11-24.
TOKENS_PER_PARAMETER = 1
SHARE_OF_PEAK = 0.55  # of the matrix product speed, reached in training on a CPU: 0.49 to 0.59 measured


@dataclass(frozen=True)
class Budget:
    """The time and speed there are to train a model."""

    config: TrainerConfig  # with a time limit, and perhaps a limit of steps
    flops: float  # operations per second in matrix products, over all ranks
    vocab_size: int

    def tokens(self, model: Transformer) -> int:
        """How many tokens this model sees in training, about."""
        config = self.config
        assert config.max_minutes is not None
        tokens = SHARE_OF_PEAK * self.flops * 60 * config.max_minutes / flops_per_token(model)
        if config.max_steps is not None:
            tokens_per_step = config.batch_size * config.grad_accumulation * model.config.context_length
            tokens = min(tokens, config.max_steps * tokens_per_step)
        return int(tokens)


def choose_size(sizes: Mapping[str, ModelConfig], budget: Budget) -> tuple[str, str]:
    """The name of the largest of `sizes` (smallest first) that pays, and the reason; the smallest if none does.

    The speed is estimated from that of matrix products, which takes no time.
    """
    chosen, why = "", ""
    for name, config in sizes.items():
        model = Transformer(config, budget.vocab_size)
        parameters, tokens = model.num_parameters(), budget.tokens(model)
        millions = f"{name} has {parameters / 1e6:.1f}M parameters"
        if chosen and tokens < TOKENS_PER_PARAMETER * parameters:
            return chosen, f"{why}: {millions} and would see {tokens / 1e6:.2g}M"
        chosen, why = name, f"{name}, for about {tokens / 1e6:.2g}M tokens in this time"
    return chosen, why
