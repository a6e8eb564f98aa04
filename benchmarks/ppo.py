"""PPO with a critic, the third stage of RLHF (Ouyang et al. 2022), as plain as it can be: TRL 1.14.2 has none.

    python -m benchmarks.ppo recipes/tiny/grpo.yaml model.adapter=SFT training.output=RUN --reward-model REWARD

It takes a GRPO recipe and uses the same questions in the same order, completions a step, temperature, optimizer,
schedule and clipping; ``data.rewards`` are only logged, for what is learnt from is the reward model's score. Four
models are in memory:

- the policy: the base with SFT's adapter, which is trained;
- the reference: the same, merged and frozen. On every token the policy pays ``KL`` × (log p − log p of the reference);
- the reward model (``benchmarks.trainers reward``), frozen: its score of a completion is earned with the last token;
- the critic, which starts as a copy of the reward model and is trained: what it says after each token is the value of
  what has been written so far. Advantages are GAE (Schulman et al. 2016) on it, whitened over the batch.

Log-probabilities are those that completions are drawn with: of the logits divided by the temperature. Nothing is
resumed: a run is written whole, or begun again.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from benchmarks.trainers import load_reward_model, parameters, recipe_arguments, total_rewards
from malpyeong.config.recipe import GRPORecipe
from malpyeong.files import write_text
from malpyeong.terminal import Command

KL, GAMMA, LAMBDA, VALUE_CLIP = 0.05, 1.0, 0.95, 0.2


def token_rewards(scores: Tensor, logps: Tensor, reference: Tensor, mask: Tensor, coefficient: float = KL) -> Tensor:
    """Return what each token earns, of shape (rows, tokens): the penalty, and with the last one the score.

    Args:
        scores: of the completions, of shape (rows,).
        logps: log-probabilities of the tokens, of shape (rows, tokens).
        reference: those of the reference.
        mask: 1 on a completion's tokens, 0 behind its end.
        coefficient: of the penalty.
    """
    rewards = -coefficient * (logps - reference) * mask
    rewards[torch.arange(len(rewards)), mask.sum(1).long() - 1] += scores
    return rewards


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = GAMMA, lam: float = LAMBDA
) -> tuple[Tensor, Tensor]:
    """Return advantages and returns, each of shape (rows, tokens), 0 behind the end.

    Args:
        rewards: of each token.
        values: of what stood before each token; behind the end there is nothing to gain.
        mask: 1 on a completion's tokens.
        gamma: discount.
        lam: 1 for returns less values, 0 for the error of one step.
    """
    values = values * mask
    advantages = torch.zeros_like(rewards)
    later = next_values = torch.zeros_like(rewards[:, 0])
    for token in reversed(range(rewards.shape[1])):
        errors = rewards[:, token] + gamma * next_values - values[:, token]
        later = advantages[:, token] = (errors + gamma * lam * later) * mask[:, token]
        next_values = values[:, token]
    return advantages, advantages + values


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """Return values with mean 0 and variance 1 over the tokens of a mask, 0 elsewhere."""
    mean = (values * mask).sum() / mask.sum()
    variance = ((values - mean).square() * mask).sum() / mask.sum()
    return (values - mean) * (variance + 1e-8).rsqrt() * mask


def policy_losses(logps: Tensor, old: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """Return the clipped loss of each token; ``old`` are the log-probabilities it was drawn with."""
    ratio = (logps - old).exp()
    return -torch.min(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


def value_losses(values: Tensor, old: Tensor, returns: Tensor, clip: float = VALUE_CLIP) -> Tensor:
    """Return half the squared error of each value, or that of the value clipped around ``old``, if it is larger."""
    clipped = old + (values - old).clamp(-clip, clip)
    return 0.5 * torch.max((values - returns).square(), (clipped - returns).square())


@dataclass(frozen=True, slots=True)
class Rollout:
    """Completions of one step, all of shape (completions, tokens), and what was known when they were drawn.

    Attributes:
        ids: prompts, padded on the left, and completions, padded on the right.
        attention: 1 on all that is no padding.
        mask: of the completions alone: 1 up to and with their end token.
    """

    ids: Tensor
    attention: Tensor
    mask: Tensor
    logps: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor


def log_probabilities(model: Any, ids: Tensor, attention: Tensor, length: int, temperature: float) -> Tensor:  # noqa: ANN401
    """Return log p of the last ``length`` tokens, of shape (rows, length)."""
    logits = model(input_ids=ids, attention_mask=attention, logits_to_keep=length + 1, use_cache=False).logits
    chosen: Tensor = (logits[:, :-1] / temperature).log_softmax(-1).gather(-1, ids[:, -length:, None]).squeeze(-1)
    return chosen


def token_scores(model: Any, ids: Tensor, attention: Tensor) -> Tensor:  # noqa: ANN401 -- a reward model with LoRA
    """Return what a reward model or critic says after each token, of shape (rows, tokens)."""
    inner = model.get_base_model()
    hidden = inner.base_model(input_ids=ids, attention_mask=attention, use_cache=False).last_hidden_state
    scores: Tensor = inner.score(hidden).squeeze(-1)
    return scores


class PPO:
    """The four models, and a step of the trained ones.

    Args:
        recipe: of GRPO.
        reward_model: folder of the reward model's adapter.
    """

    def __init__(self, recipe: GRPORecipe, reward_model: Path) -> None:
        from transformers import get_scheduler

        from malpyeong.models.load import load_for_prediction, load_for_training

        block, training = recipe.model, recipe.training
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        policy, self.tokenizer = load_for_training(block, training.seed, gradient_checkpointing=False)
        reference = load_for_prediction(block.name, block.adapter, block.dtype)[0].requires_grad_(False)
        critic, judge = (load_reward_model(block, reward_model, trained) for trained in (True, False))
        self.policy, self.reference, self.critic, self.judge = (
            model.to(self.device).eval() for model in (policy, reference, critic, judge)
        )
        self._recipe = recipe
        self._trained = [
            [one for one in model.parameters() if one.requires_grad] for model in (self.policy, self.critic)
        ]
        self._optimizer = torch.optim.AdamW(
            [*self._trained[0], *self._trained[1]], training.learning_rate, weight_decay=training.weight_decay
        )
        self._scheduler = get_scheduler(
            training.lr_scheduler_type, self._optimizer, training.warmup_steps, training.max_steps
        )

    @torch.no_grad()
    def rollout(self, questions: dict[str, list[Any]]) -> tuple[Rollout, dict[str, float]]:
        """Sample completions, and let the other models judge them; return what is logged of them, too."""
        from malpyeong.prompts.messages import prompt_ids

        training, start = self._recipe.training, time.perf_counter()
        prompts = [prompt_ids(self.tokenizer, messages) for messages in questions["prompt"]]
        references = questions["reference"]
        groups = [row for row in range(len(prompts)) for _ in range(training.num_generations)]
        padded = {"input_ids": [prompts[row] for row in groups]}
        batch = self.tokenizer.pad(padded, return_tensors="pt", padding_side="left").to(self.device)
        ids = self.policy.generate(
            **batch,
            do_sample=True,
            temperature=training.temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=training.max_completion_length,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        length = ids.shape[1] - batch["input_ids"].shape[1]
        ends = ids[:, -length:] == self.tokenizer.eos_token_id
        mask = (ends.cumsum(1) - ends.long() == 0).float()
        attention = torch.cat([batch["attention_mask"], mask.long()], 1)
        generated = time.perf_counter() - start
        logps, reference = (
            log_probabilities(model, ids, attention, length, training.temperature)
            for model in (self.policy, self.reference)
        )
        values = token_scores(self.critic, ids, attention)[:, -length - 1 : -1] * mask
        last = (mask.sum(1).long() - 1)[:, None]
        scores = token_scores(self.judge, ids, attention)[:, -length:].gather(1, last).squeeze(1)
        advantages, returns = gae(token_rewards(scores, logps, reference, mask), values, mask)

        texts = self.tokenizer.batch_decode(ids[:, -length:], skip_special_tokens=True)
        rewards = torch.tensor(total_rewards(self._recipe.data.rewards, texts, [references[row] for row in groups]))
        error = ((returns - values) * mask).square().sum() / mask.sum()
        variance = returns[mask.bool()].var()
        figures = {
            "reward": rewards.mean(),
            "reward_model": scores.mean(),
            "reward_model_accuracy": accuracy(scores.cpu(), rewards, training.num_generations),
            "kl": ((logps - reference) * mask).sum(1).mean(),  # nats a completion
            "explained_variance": 1 - error / variance,
            "completions/mean_length": mask.sum(1).mean(),
            "completions/clipped_ratio": 1 - ends.any(1).float().mean(),
            "generate_seconds": torch.tensor(generated),
        }
        rolled_out = Rollout(ids, attention, mask, logps, values, whiten(advantages, mask), returns)
        return rolled_out, {name: value.item() for name, value in figures.items() if value.isfinite()}

    def update(self, rollout: Rollout) -> dict[str, float]:
        """Make one step of both trained models on completions, ``training.batch_size`` at once."""
        training, length = self._recipe.training, rollout.mask.shape[1]
        sums = {"policy_loss": 0.0, "value_loss": 0.0}
        for start in range(0, len(rollout.ids), training.batch_size):
            part = slice(start, start + training.batch_size)
            ids, attention = rollout.ids[part], rollout.attention[part]
            logps = log_probabilities(self.policy, ids, attention, length, training.temperature)
            low, high = training.epsilon, training.epsilon_high
            losses = policy_losses(logps, rollout.logps[part], rollout.advantages[part], low, high)
            sums["policy_loss"] += self._learn(losses, part, rollout)
            values = token_scores(self.critic, ids, attention)[:, -length - 1 : -1]
            losses = value_losses(values, rollout.values[part], rollout.returns[part])
            sums["value_loss"] += self._learn(losses, part, rollout)
        norms = [torch.nn.utils.clip_grad_norm_(trained, training.max_grad_norm).item() for trained in self._trained]
        self._optimizer.step()
        self._scheduler.step()
        self._optimizer.zero_grad()
        return {**sums, "loss": sum(sums.values()), "grad_norm": norms[0], "critic_grad_norm": norms[1]}

    @staticmethod
    def _learn(losses: Tensor, part: slice, rollout: Rollout) -> float:
        """Add the gradients of the mean over all tokens of a rollout, as far as a part of it goes; return that."""
        mean = (losses * rollout.mask[part]).sum() / rollout.mask.sum()
        mean.backward()  # type: ignore[no-untyped-call]
        return mean.item()


def accuracy(scores: Tensor, rewards: Tensor, group: int) -> Tensor:
    """Return how many pairs of a question's completions the reward model puts into the order of their rewards."""
    differences = [values.view(-1, group, 1) - values.view(-1, 1, group) for values in (scores, rewards)]
    ordered = differences[1] > 0
    return (differences[0][ordered] > 0).float().mean()


@click.command(cls=Command)
@recipe_arguments
@click.option("--reward-model", required=True, type=click.Path(path_type=Path), help="Folder of its adapter.")
def main(recipe: GRPORecipe, reward_model: Path) -> None:
    """Train a LoRA adapter by PPO with the questions and settings of a GRPO RECIPE."""
    from malpyeong.decoding.dev import DevScores
    from malpyeong.training.callbacks import progress_line
    from malpyeong.training.data import grpo_dataset, load_questions
    from malpyeong.training.run import finish_run, trained_weights

    block, training, output = recipe.model, recipe.training, Path(recipe.training.output)
    ppo = PPO(recipe, reward_model)
    questions, prompts = load_questions(recipe.data.train, recipe.data), training.generations * training.groups
    limits = block.max_length, training.max_completion_length
    dataset = grpo_dataset(ppo.tokenizer, questions, *limits, prompts, training.seed)
    asked = load_questions(recipe.data.dev or recipe.data.train, recipe.data)
    dev = DevScores(ppo.tokenizer, asked, *limits, training.effective_batch_size, {}, output)
    scores, log = [{"step": 0, **dev.scores(ppo.policy)}], []
    torch.manual_seed(training.seed)
    rollout, figures = None, {}
    for step in range(training.max_steps):
        start = time.perf_counter()
        if step % training.num_iterations == 0:
            first = step // training.num_iterations * training.groups
            rollout, figures = ppo.rollout(dataset[first : first + training.groups])
        assert rollout is not None  # step 0 has made one
        row = {"step": step + 1, **figures, **ppo.update(rollout), "step_seconds": time.perf_counter() - start}
        log.append(row)
        click.echo(f"{progress_line(step + 1, row)}, reward model {row['reward_model']:.3f}, KL {row['kl']:.3f}")
        if (step + 1) % training.eval_steps == 0 or step + 1 == training.max_steps:
            scores.append({"step": step + 1, **dev.scores(ppo.policy)})
            write_text(output / "scores.json", json.dumps(scores, indent=1) + "\n")
    models = {"policy": ppo.policy, "reference": ppo.reference, "critic": ppo.critic, "reward model": ppo.judge}
    counts = {name: parameters(model) for name, model in models.items()}
    write_text(output / "parameters.json", json.dumps(counts, indent=1) + "\n")
    ppo.tokenizer.model_max_length = block.max_length
    finish_run(output, ppo.policy, trained_weights(ppo.policy), ppo.tokenizer, block.name, log)


if __name__ == "__main__":
    main()
