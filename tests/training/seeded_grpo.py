"""Runs recipes/grpo.py with completions that do not depend on how many processes share a step.

Every token is still drawn from the model's distribution, but by noise (Gumbel-max) that is seeded by the step, the
completion's place among all processes' and the token's position, not by a process's own generator.
"""

import runpy
import sys
from pathlib import Path

import torch
from transformers import GenerationMixin, LogitsProcessor, LogitsProcessorList
from trl import GRPOTrainer


class SeededDraw(LogitsProcessor):
    """Leaves only the drawn token."""

    def __init__(self, step: int, first: int) -> None:
        self._step, self._first, self._position = step, first, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return scores, of shape (rows, vocabulary), that are 0 for one token of each row and -inf for the others."""
        self._position += 1
        seeds = [(self._step * 100 + self._first + row) * 1000 + self._position for row in range(len(scores))]
        uniform = torch.stack(
            [torch.rand(scores.shape[1], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        )
        drawn = (scores.log_softmax(-1) - (-uniform.log()).log()).argmax(-1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter(1, drawn, 0.0)


_generate, _single_turn, place = GenerationMixin.generate, GRPOTrainer._generate_single_turn, [0, 0]


def generate(self, *args, **kwargs):
    if getattr(kwargs.get("generation_config"), "do_sample", False):  # not when dev is answered
        kwargs["logits_processor"] = LogitsProcessorList([SeededDraw(*place)])
    return _generate(self, *args, **kwargs)


def single_turn(self, prompt_ids, *rest):
    place[:] = self.state.global_step, self.accelerator.process_index * len(prompt_ids)
    return _single_turn(self, prompt_ids, *rest)


# Of several processes on a CPU, accelerate calls the device cpu:0, to which torch.load cannot map an optimizer's state.
torch.serialization.register_package(
    0, lambda _: None, lambda storage, location: storage if location.startswith("cpu:") else None
)
GenerationMixin.generate, GRPOTrainer._generate_single_turn = generate, single_turn
sys.argv[0] = str(Path(__file__).parents[2] / "recipes" / "grpo.py")
runpy.run_path(sys.argv[0], run_name="__main__")
