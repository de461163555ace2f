"""How large a model is worth training: what a run takes where no size is asked for (`model=auto`)."""

from collections.abc import Mapping
from dataclasses import dataclass

from minitf.model import ModelConfig, Transformer
from minitf.training.trainer_config import TrainerConfig

# A model is worth its size when it sees as many tokens in its time as it has parameters, however often it has to read a
# short text for them: see benchmark/log.md, 2026-11-24.
TOKENS_PER_PARAMETER = 1
SHARE_OF_PEAK = 0.55  # of the speed of matrix products, in training on a processor: 0.49 to 0.59 measured


@dataclass(frozen=True)
class Budget:
    """What there is to train a model with."""

    config: TrainerConfig  # with its `minutes`, and its steps if they are limited too
    flops: float  # floating point operations a second of matrix products, of all processes
    vocab_size: int

    def tokens(self, model: Transformer) -> int:
        """How many tokens training can show this model, about."""
        config = self.config
        assert config.minutes is not None
        tokens = SHARE_OF_PEAK * self.flops * 60 * config.minutes / model.flops_per_token()
        if config.max_steps is not None:
            tokens_per_step = config.batch_size * config.grad_accumulation * model.config.context_length
            tokens = min(tokens, config.max_steps * tokens_per_step)
        return int(tokens)


def choose_size(sizes: Mapping[str, ModelConfig], budget: Budget) -> tuple[str, str]:
    """The name of the largest of `sizes` (smallest first) that is worth training, and why, in words.

    The smallest is taken where none is. The speed is estimated from that of matrix products, so that it takes no time.
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
