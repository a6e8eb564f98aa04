"""The gold answer among a group's completions: SFT's gradient within GRPO's.

GRPO moves what the model samples towards the best of it; where no sample names the right rule there is nothing
to move to, and a reason that is not sampled is forgotten. With ``training.gold_advantage`` the last completion of each
group is the gold answer. At the first update after sampling its ratio is 1, so that its gradient is SFT's, weighted by
the advantage, in the same loss and by the same optimizer (as the off-policy demonstrations of LUFFY, Yan et al. 2025,
and the SFT term of CHORD, Zhang et al. 2025). The samples' baseline does not know it: its rewards are NaN, which TRL
leaves out of means, deviations and logs.
"""

from collections.abc import Mapping, MutableSequence, Sequence
from typing import TYPE_CHECKING, Any

from malpyeong.models.environment import processes
from malpyeong.prompts.messages import completion_ids
from malpyeong.prompts.rule_choice import best_choice, tag

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


def gold_text(row: Mapping[str, Any]) -> str:
    """Return the completion that a row of :func:`malpyeong.training.data.grpo_dataset` wants, with its tag if any."""
    named = tag(best_choice(row["candidates"], row["gains"])) if "candidates" in row else ""
    return f"{named}{row['reference']}"


class GoldAnswers:
    """Puts the gold answer in the place of each group's last completion.

    Args:
        tokenizer: of the policy.
        num_generations: completions of a group, which follow each other over all processes.
        advantage: of the gold answer, in units of the others': ``scale_rewards`` brings theirs to a deviation of 1.
        max_length: tokens that a completion may have; a longer gold answer is cut.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", num_generations: int, advantage: float, max_length: int
    ) -> None:
        self._tokenizer, self._size = tokenizer, num_generations
        self._advantage, self._max_length = advantage, max_length
        self._rows: Sequence[Mapping[str, Any]] = ()

    def asked(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Take the rows whose completions are sampled next."""
        self._rows = rows

    def places(self, count: int) -> list[int]:
        """Return where the gold answers are among ``count`` completions of this process."""
        from accelerate import PartialState

        first = PartialState().process_index * count if processes() > 1 else 0
        return [place for place in range(count) if (first + place) % self._size == self._size - 1]

    def put(self, generated: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return what the trainer's ``_generate`` returned with the gold answers in it.

        Their log-probabilities are not known, as None says: where another engine samples, their ratio to the policy's
        is then 1.
        """
        prompt_ids, ids, tool_mask, completions, logprobs, *rest = generated
        ids, completions = list(ids), list(completions)
        logprobs = None if logprobs is None else list(logprobs)
        for place in self.places(len(ids)):
            text = gold_text(self._rows[place])
            ids[place] = completion_ids(self._tokenizer, text)[: self._max_length]
            completions[place] = [{"role": "assistant", "content": text}]
            if logprobs is not None:
                logprobs[place] = [None] * len(ids[place])
        return (prompt_ids, ids, tool_mask, completions, logprobs, *rest)

    def unscored(self, rewards: "torch.Tensor") -> "torch.Tensor":
        """Return rewards of shape (completions of all processes, functions) without those of the gold answers."""
        rewards[self._size - 1 :: self._size] = float("nan")
        return rewards

    def weigh(self, scored: dict[str, Any], logged: MutableSequence[float]) -> dict[str, Any]:
        """Return a batch with its gold answers' advantage, which the log of all processes' advantages shows too."""
        advantages = scored["advantages"]
        advantages[self.places(len(advantages))] = self._advantage
        for place in range(self._size - 1, len(logged), self._size):
            logged[place] = self._advantage
        return scored
