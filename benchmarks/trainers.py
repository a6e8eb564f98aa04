"""What ``benchmarks.compare`` trains beside the recipes: TRL's RLOO, DPO and reward trainers on the tiny model.

    python -m benchmarks.trainers rloo recipes/tiny/grpo.yaml model.adapter=SFT training.output=RUN
    python -m benchmarks.trainers sample recipes/tiny/grpo.yaml model.adapter=SFT training.output=RUN
    python -m benchmarks.trainers dpo recipes/tiny/grpo.yaml model.adapter=SFT training.output=RUN2 --samples RUN

Each takes a GRPO recipe, and from it the questions and their order, the group size, steps, batch, learning rate,
schedule and rewards; what is its own stands in a constant here. Nothing is resumed: a run is written whole, or begun
again.
"""

import functools
import json
import runpy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from malpyeong.config.load import load_recipe
from malpyeong.config.recipe import GRPORecipe, ModelBlock
from malpyeong.contest.answer import format_problem
from malpyeong.contest.records import write_records
from malpyeong.errors import InputError
from malpyeong.files import write_text
from malpyeong.models.environment import prepare_environment
from malpyeong.terminal import Group
from malpyeong.training.data import grpo_dataset, load_questions
from malpyeong.training.rewards import REWARDS, RewardRun

GRPO = Path(__file__).parent.parent / "recipes" / "grpo.py"
DPO_BETA = 0.1
# Of the reward model, whose head starts from nothing: batches of pairs, twice the recipe's steps, a higher rate.
REWARD_PAIRS, REWARD_STEPS, REWARD_RATE = 32, 2, 1e-3
# Of its pairs: smaller differences are mostly by which of six endings of a reason the sample data have drawn.
REWARD_MARGIN = 0.5


def recipe_arguments(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command RECIPE and overrides, and its function the resolved GRPO ``recipe``."""

    @click.argument("recipe_file", metavar="RECIPE", type=click.Path(path_type=Path))
    @click.argument("overrides", nargs=-1, metavar="[block.key=value]...")
    @functools.wraps(function)
    def command(recipe_file: Path, overrides: tuple[str, ...], **options: Any) -> None:  # noqa: ANN401
        prepare_environment()
        function(load_recipe(recipe_file, overrides, GRPORecipe), **options)

    return command


def total_rewards(weights: dict[str, float], completions: Sequence[str], references: Sequence[str]) -> list[float]:
    """Return the weighted reward of each completion, as TRL adds it up: what does not apply counts nothing."""
    totals = [0.0] * len(completions)
    for name, weight in weights.items():
        for row, reward in enumerate(REWARDS[name](completions=completions, reference=references)):
            totals[row] += weight * (reward or 0.0)
    return totals


def parameters(model: Any) -> dict[str, int]:  # noqa: ANN401 -- any torch module
    """Return how many weights of a model are trained, and how many are in memory."""
    counts = [(one.numel(), one.requires_grad) for one in model.parameters()]
    return {
        "trained": sum(count for count, trained in counts if trained),
        "resident": sum(count for count, _ in counts),
    }


@click.group(cls=Group)
def main() -> None:
    """Train by RLOO, DPO, or a reward model; sample what the latter two learn from."""


@main.command()
@recipe_arguments
def sample(recipe: GRPORecipe) -> None:
    """Sample a group of completions of each question that GRPO would ask.

    Writes into ``training.output``: ``samples.json`` with their rewards, ``best.json``, a contest file of the best
    well-formed one of each question, and ``gold.json``, one of the gold answers.
    """
    from tqdm import tqdm

    from malpyeong.decoding.answers import sample
    from malpyeong.decoding.engines import Decoding, TransformersEngine
    from malpyeong.models.load import load_for_prediction
    from malpyeong.prompts.messages import fit_prompts

    block, training, output = recipe.model, recipe.training, Path(recipe.training.output)
    model, tokenizer = load_for_prediction(block.name, block.adapter, block.dtype)
    questions, prompts = load_questions(recipe.data.train, recipe.data), training.generations * training.groups
    limits = block.max_length, training.max_completion_length
    order = grpo_dataset(tokenizer, questions, *limits, prompts, training.seed)["record_id"]
    by_id = {record.id: record for record in questions.records}
    records = [by_id[id_] for id_ in dict.fromkeys(order)]
    rendered = fit_prompts(tokenizer, records, [questions.asked_with[0]] * len(records), [limits[0]] * len(records))
    drawn = training.num_generations
    # The engine's first answer is the greedy one, which is left out.
    decoding = Decoding(False, drawn + 1, training.temperature, training.seed, limits[1])
    engine, start = TransformersEngine(model, tokenizer, decoding), time.perf_counter()
    answers = dict(tqdm(sample(engine, rendered, training.effective_batch_size), total=len(records), unit="question"))
    seconds = time.perf_counter() - start
    rows, best = [], []
    for row, record in enumerate(records):
        texts, gold = answers[row][1:], record.answer or ""
        rewards = total_rewards(recipe.data.rewards, texts, [gold] * drawn)
        rows.append({"id": record.id, "texts": texts, "rewards": rewards})
        text = texts[max(range(drawn), key=rewards.__getitem__)]
        if format_problem(text) is None:
            best.append(record.with_answer(text))
    write_records(output / "best.json", best)
    write_records(output / "gold.json", records)
    drawn_all = {"seconds": seconds, "completions": drawn * len(rows), "questions": rows}
    write_text(output / "samples.json", json.dumps(drawn_all, ensure_ascii=False, indent=1) + "\n")


def pairs(samples: Path, widest: bool, margin: float = 0.0) -> Iterator[tuple[str, str, str]]:
    """Yield record id, chosen and rejected text of samples that earn different rewards.

    Args:
        samples: folder of what ``sample`` wrote.
        widest: of each question the best and the worst alone, else all pairs.
        margin: how much the rewards differ at least.
    """
    for row in json.loads((samples / "samples.json").read_text("utf-8"))["questions"]:
        ranked = sorted(zip(row["rewards"], row["texts"], strict=True), key=lambda one: -one[0])
        for place, (reward, chosen) in enumerate(ranked[:1] if widest else ranked):
            for other, rejected in ranked[-1:] if widest else ranked[place + 1 :]:
                if reward > other and reward - other >= margin:
                    yield row["id"], chosen, rejected


def preference_dataset(
    tokenizer: Any,  # noqa: ANN401
    recipe: GRPORecipe,
    samples: Path,
    widest: bool,
    margin: float = 0.0,
) -> Any:  # noqa: ANN401
    """Return ``prompt_ids``, ``chosen_ids`` and ``rejected_ids``: the tokens of SFT and GRPO, not rendered anew.

    A completion that had no room for its end has none here.
    """
    from datasets import Dataset

    from malpyeong.prompts.messages import completion_ids, render

    by_id = {record.id: record for record in load_questions(recipe.data.train, recipe.data).records}
    limit = recipe.training.max_completion_length

    def tokens(text: str) -> list[int]:
        return completion_ids(tokenizer, text)[:limit]

    rows = [
        {
            "prompt_ids": render(tokenizer, by_id[id_]).ids,
            "chosen_ids": tokens(chosen),
            "rejected_ids": tokens(rejected),
        }
        for id_, chosen, rejected in pairs(samples, widest, margin)
    ]
    if not rows:
        raise InputError(f"{samples}: all samples of each question earn the same; train SFT longer")
    return Dataset.from_list(rows)


def stated(recipe: GRPORecipe, config: type[Any], **own: Any) -> Any:  # noqa: ANN401 -- a TRL config
    """Return a TRL config with what recipes/grpo.py states, as far as it knows that, and what is its own."""
    grpo = runpy.run_path(str(GRPO))["arguments"](recipe, "hf")
    known = {field.name for field in fields(config)}
    unsaved = {"save_strategy": "no", "load_best_model_at_end": False, "log_completions": False}
    return config(**{key: value for key, value in {**grpo, **unsaved, **own}.items() if key in known})


def run(recipe: GRPORecipe, trainer_class: type[Any], tokenizer: Any, clock: Any, **arguments: Any) -> None:  # noqa: ANN401
    """Train, with the dev score every ``eval_steps``, and save the last adapter, the log and the numbers of weights."""
    from malpyeong.decoding.dev import DevScores
    from malpyeong.training.callbacks import show_progress
    from malpyeong.training.run import finish_run, trained_weights

    block, training, output = recipe.model, recipe.training, Path(recipe.training.output)
    limits = block.max_length, training.max_completion_length
    asked = load_questions(recipe.data.dev or recipe.data.train, recipe.data)
    dev = DevScores(tokenizer, asked, *limits, training.effective_batch_size, {}, output)

    class ScoredTrainer(trainer_class):  # type: ignore[misc, valid-type]
        def _generate(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 -- as in TRL
            with clock.generating():
                return super()._generate(*args, **kwargs)

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:  # noqa: ANN401 -- is in tokens
            return dataset

        def evaluation_loop(self, *_: Any, **__: Any) -> Any:  # noqa: ANN401 -- as in transformers
            return dev.evaluate(self.model)

    dataset = arguments["train_dataset"]
    trainer = ScoredTrainer(
        processing_class=tokenizer, callbacks=[clock, dev], eval_dataset=dataset.select([0]), **arguments
    )
    show_progress(trainer)
    dev.score_start(trainer.model)
    trainer.train()
    reference = {name: one.numel() for name, one in trainer.model.named_parameters() if ".ref." in name}
    policy = parameters(trainer.model)
    policy["resident"] -= sum(reference.values())
    counts = {"policy": policy, "reference": {"trained": 0, "resident": sum(reference.values())}}
    write_text(output / "parameters.json", json.dumps(counts, indent=1) + "\n")
    tokenizer.model_max_length = block.max_length
    weights = trained_weights(trainer.model)
    finish_run(output, trainer.model, weights, tokenizer, block.name, trainer.state.log_history)


@main.command()
@recipe_arguments
def rloo(recipe: GRPORecipe) -> None:
    """Train by RLOO: the advantage is the reward less the mean of the group's others, and there is no KL penalty."""
    from trl import RLOOConfig, RLOOTrainer

    from malpyeong.models.load import load_for_training
    from malpyeong.training.callbacks import StepClock

    block, training = recipe.model, recipe.training
    model, tokenizer = load_for_training(block, training.seed, training.gradient_checkpointing)
    questions, prompts = load_questions(recipe.data.train, recipe.data), training.generations * training.groups
    limits = block.max_length, training.max_completion_length
    rewards = RewardRun(recipe.data.rewards, training.num_generations)
    run(
        recipe,
        RLOOTrainer,
        tokenizer,
        StepClock(rewards),
        model=model,
        args=stated(recipe, RLOOConfig),
        reward_funcs=rewards.functions,
        train_dataset=grpo_dataset(tokenizer, questions, *limits, prompts, training.seed),
    )


samples_option = click.option(
    "--samples", required=True, type=click.Path(path_type=Path), help="Folder of what sample wrote."
)


@main.command()
@recipe_arguments
@samples_option
def dpo(recipe: GRPORecipe, samples: Path) -> None:
    """Train by DPO on the best and the worst sample of each question, as many pairs a step as GRPO asks questions."""
    from trl import DPOConfig, DPOTrainer

    from malpyeong.models.load import load_for_training
    from malpyeong.training.callbacks import StepClock

    model, tokenizer = load_for_training(recipe.model, recipe.training.seed, recipe.training.gradient_checkpointing)
    size = {"per_device_train_batch_size": recipe.training.groups, "gradient_accumulation_steps": 1}
    run(
        recipe,
        DPOTrainer,
        tokenizer,
        StepClock(),
        model=model,
        args=stated(recipe, DPOConfig, **size, beta=DPO_BETA, loss_type=["sigmoid"], max_length=None),
        train_dataset=preference_dataset(tokenizer, recipe, samples, widest=True),
    )


@main.command()
@recipe_arguments
@samples_option
def reward(recipe: GRPORecipe, samples: Path) -> None:
    """Train a reward model on all pairs of a question's samples whose rewards differ clearly."""
    from trl import RewardConfig, RewardTrainer

    from malpyeong.models.tokenizer import tokenizer_of
    from malpyeong.training.callbacks import StepClock, show_progress
    from malpyeong.training.run import finish_run, trained_weights

    block, output, tokenizer = recipe.model, Path(recipe.training.output), tokenizer_of(recipe.model)
    rows = preference_dataset(tokenizer, recipe, samples, widest=False, margin=REWARD_MARGIN)
    whole = [
        {name: row["prompt_ids"] + row[name] for name in ("chosen_ids", "rejected_ids")}
        for row in rows.shuffle(seed=recipe.training.seed)
    ]
    own = {
        "max_steps": REWARD_STEPS * recipe.training.max_steps,
        "learning_rate": REWARD_RATE,
        "per_device_train_batch_size": REWARD_PAIRS,
        "gradient_accumulation_steps": 1,
        "eval_strategy": "no",
        "center_rewards_coefficient": 0.01,
        "max_length": None,
    }
    model = load_reward_model(block, None, trained=True, seed=recipe.training.seed)
    trainer = RewardTrainer(
        model=model,
        args=stated(recipe, RewardConfig, **own),
        train_dataset=type(rows).from_list(whole),
        processing_class=tokenizer,
        callbacks=[StepClock()],
    )
    show_progress(trainer)
    trainer.train()
    write_text(output / "parameters.json", json.dumps({"reward model": parameters(model)}, indent=1) + "\n")
    finish_run(output, model, trained_weights(model), tokenizer, block.name, trainer.state.log_history)


def load_reward_model(block: ModelBlock, adapter: Path | None, trained: bool, seed: int = 0) -> Any:  # noqa: ANN401
    """Return a reward model: SFT's, merged, with a LoRA adapter and one number in the place of the logits.

    Args:
        block: of the recipe; its adapter is SFT's.
        adapter: folder of what :func:`reward` trained; None for a new one.
        trained: whether it is to be trained (further).
        seed: of a new one.
    """
    from copy import deepcopy

    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForSequenceClassification, set_seed

    from malpyeong.models.load import load_for_prediction

    sft, tokenizer = load_for_prediction(block.name, block.adapter, block.dtype)
    config = deepcopy(sft.config)
    config.num_labels, config.pad_token_id = 1, tokenizer.pad_token_id
    set_seed(seed)
    base = AutoModelForSequenceClassification.from_config(config, dtype=sft.dtype)
    base.base_model.load_state_dict(sft.base_model.state_dict())
    if adapter is not None:
        return PeftModel.from_pretrained(base, str(adapter), is_trainable=trained)
    lora = {"r": block.lora.r, "lora_alpha": block.lora.alpha, "target_modules": list(block.lora.target_modules)}
    return get_peft_model(base, LoraConfig(task_type="SEQ_CLS", **lora))


if __name__ == "__main__":
    main()
