"""The cost of saving: how long training waits for checkpoints, at the default interval."""

from minitf.benchmark.comparison import Row
from minitf.benchmark.library import ENVIRONMENT
from minitf.benchmark.report import Report, Request
from minitf.benchmark.training import TOY, train

MINUTES = 3.0
# GPT-2's weights with little computation: the checkpoints have their full size.
GPT2 = [
    "model=gpt2", "model.context_length=256", "trainer.batch_size=4", "trainer.eval_tokens=4096",
    "trainer.sample_tokens=0", "trainer.attention_every=-1", "attention.heads=false", "trainer.compile=false",
]  # fmt: skip


def saving(request: Request, report: Report) -> None:
    """The benchmark of this name: the default run, and 124M weights, for three minutes each."""
    toy = [f"model.{key}={value}" for key, value in TOY.items()]
    sides = {"the default run": toy} if request.quick else {"the default run": [], "124M weights": GPT2}
    minutes = 0.02 if request.quick else MINUTES
    for name, overrides in sides.items():
        results = [
            train(
                request, [*overrides, f"trainer.max_minutes={minutes}"], f"saving-{name.replace(' ', '-')}-{round_}",
                timed=["run", "save"], environment=ENVIRONMENT,
            )
            for round_ in range(request.repeats)
        ]  # fmt: skip
        shares = [100 * result["seconds"]["save"] / result["seconds"]["run"] for result in results]
        last = results[-1]
        note = f"{last['seconds']['save']:.2f} of {last['seconds']['run']:.0f} s, {last['train'][-1]['step']} steps"
        raw = {"seconds": [result["seconds"] for result in results]}
        report.add(Row(f"{name}: waiting for saves", "% of the loop", shares, more_is_better=False, note=note, raw=raw))
