"""Memory and time of a GRPO step for 8B to 70B on 1 to 64 cards: arithmetic from one card's measured figures.

    python -m benchmarks.scaling

Measured (benchmarks/results/h200-2026-11-26.jsonl, docs/gpu.md): Qwen3-4B on one H200. Everything else is extrapolated,
by the formulas of docs/scaling.md; nothing has run on several GPUs.
"""

from dataclasses import replace

import click

from malpyeong.models.memory import GIB, RESERVE, SHAPES, ModelShape, estimate
from malpyeong.terminal import Command

CARDS = (1, 2, 4, 8, 16, 32, 64)
# Qwen3's and Llama 3's published shapes beside those that the package knows.
MODELS = {
    "8B (Qwen3-8B)": SHAPES["Qwen/Qwen3-8B"],
    "11.5B (Midm-2.0)": SHAPES["K-intelligence/Midm-2.0-Base-Instruct"],
    "14B (Qwen3-14B)": ModelShape(5120, 40, 40, 8, 128, 17_408, 151_936, False),
    "32B (Qwen3-32B)": ModelShape(5120, 64, 64, 8, 128, 25_600, 151_936, False),
    "70B (Llama-3-70B)": ModelShape(8192, 80, 64, 8, 128, 28_672, 128_256, False),
}
COMPLETIONS, BATCH, PROMPT, COMPLETION = 16, 4, 1_300, 320  # of one card: completions, micro-batch; tokens
USABLE = 78.5  # GiB of an 80 GB card

# Measured on Qwen3-4B. Update: 16 × 1,620 tokens in 3.65 s. Sampling: vLLM, 64 answers of at most 160 tokens in 3.9 s.
# Rewards: 16 completions in 1.7 s on 16 CPU cores.
UPDATE_SECONDS, UPDATE_TOKENS, SAMPLED_PER_SECOND, REWARD_SECONDS = 3.65, 16 * 1_620, 64 * 160 / 3.9, 1.7
# Of data sheets, not measured: bytes a second of a card's links within a machine of 8 cards, and between machines.
NVLINK, NETWORK = 300e9, 40e9


def parameters(shape: ModelShape) -> int:
    """Return all weights of a model."""
    return shape.block_parameters + shape.other_parameters


def memory(shape: ModelShape, cards: int) -> float:
    """Return GiB of one card: 16-bit weights and the adapter's states in equal parts, its own completions in full."""
    whole = estimate(
        shape,
        stage="grpo",
        max_length=PROMPT + COMPLETION,
        batch_size=BATCH,
        max_completion_length=COMPLETION,
        completions=COMPLETIONS,
        load_in_4bit=False,
    )
    parts = {name: getattr(whole, name) // cards for name in ("weights", "adapter", "gradients")}
    gathered = 2 * 2 * shape.block_parameters // shape.layers if cards > 1 else 0  # this block's weights and the next's
    return (replace(whole, **parts).peak + gathered) / GIB


def seconds(shape: ModelShape, cards: int) -> tuple[float, float, float]:
    """Return (sampling with vLLM, update, communication) of a step of 16 completions a card."""
    size = parameters(shape) / parameters(SHAPES["Qwen/Qwen3-4B"])
    sampling = COMPLETIONS * COMPLETION / SAMPLED_PER_SECOND * size
    update = UPDATE_SECONDS * COMPLETIONS * (PROMPT + COMPLETION) / UPDATE_TOKENS * size
    # Each micro-batch gathers all weights for its forward pass, the recomputation and its backward pass.
    gathered = 3 * COMPLETIONS // BATCH * 2 * parameters(shape) * (cards - 1) / cards
    return sampling, update, gathered / (NVLINK if cards <= 8 else NETWORK)


@click.command(cls=Command)
def main() -> None:
    """Print a table: GiB of a card (! where 80 GB do not suffice) / seconds of a step / completions an hour."""
    click.echo("| model | " + " | ".join(f"{cards}" for cards in CARDS) + " |")
    click.echo("|-|" + "-|" * len(CARDS))
    for name, shape in MODELS.items():
        cells = []
        for cards in CARDS:
            gib, step = memory(shape, cards), sum(seconds(shape, cards)) + REWARD_SECONDS
            mark = " !" if gib > USABLE * (1 - RESERVE) else ""
            cells.append(f"{gib:.0f}{mark} / {step:.0f} / {3600 * COMPLETIONS * cards / step:,.0f}")
        click.echo(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
