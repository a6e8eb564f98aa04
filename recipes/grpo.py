"""GRPO on the contest's own metrics, starting from an SFT adapter.

    python recipes/grpo.py recipes/tiny/grpo.yaml
    python recipes/grpo.py recipes/grpo.yaml recipes/models/qwen.yaml model.adapter=runs/qwen-sft/adapter

For each prompt ``num_generations`` completions are sampled and scored by the rewards of ``data.rewards`` (a weight
each); a completion's advantage is its weighted reward less its group's mean. Where this departs from the paper
(Shao et al. 2024, DeepSeekMath): ``loss_type`` dapo weighs tokens alike over the batch, ``epsilon_high`` clips
upwards later than downwards, and ``beta`` 0 needs no reference adapter.

- Rewards are the scorers that the leaderboard uses, cut by the contest's literal split
  (``malpyeong/training/rewards.py``).
- Logged beside TRL's metrics: dead groups, each reward's within-group standard deviation, seconds that sampling,
  rewards and update took, the GPU's memory; and the completions of every logged step with their rewards and advantages
  (``completions/``).
- With ``gold_advantage`` each group's last completion is the gold answer (``malpyeong/training/gold.py``).
- With ``data.dev`` the contest's score of its answers is measured every ``eval_steps`` and the best adapter is kept
  (``scores.json``, ``best.json``; ``malpyeong/decoding/dev.py``).
- Prompts that do not fit ``model.max_length`` with a whole completion are an error, never cut.
- ``--resume auto`` resumes from the last complete checkpoint to the same result as an uninterrupted run (with bertscore
  or bleurt up to their rounding, about 1e-5, which depends on what is scored together).

Raises ``InputError`` (exit code 2) for anything wrong with the recipe or the data.
"""

import time
from pathlib import Path
from typing import Any

import click

from malpyeong.config.load import load_recipe
from malpyeong.config.recipe import GRPORecipe
from malpyeong.errors import InputError, counted
from malpyeong.models.environment import prepare_environment
from malpyeong.models.load import choose_backend, load_for_training
from malpyeong.models.memory import VLLM_SHARE, Backend
from malpyeong.prompts.messages import TEMPLATE_OPTIONS
from malpyeong.terminal import Command
from malpyeong.training.arguments import check_arguments, expected_arguments
from malpyeong.training.data import grpo_dataset, load_questions, load_train, with_prompt_data
from malpyeong.training.gold import GoldAnswers
from malpyeong.training.preview import preview
from malpyeong.training.rewards import RewardRun, functions_of, load_models
from malpyeong.training.run import open_run
from malpyeong.training.session import announce_compilation, batches, keep_reference, precision, recorded, trackers


def arguments(recipe: GRPORecipe, backend: Backend) -> dict[str, Any]:
    """Return the trainer's arguments.

    Every one that matters is stated, and looked at again once the trainer is made: Unsloth's have other defaults.
    """
    model_block, training, dev = recipe.model, recipe.training, recipe.data.dev is not None
    return {
        "output_dir": training.output,
        "seed": training.seed,
        "data_seed": training.seed,
        "max_steps": training.max_steps,
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": training.lr_scheduler_type,
        "warmup_steps": training.warmup_steps,
        **batches(training),
        "per_device_eval_batch_size": training.batch_size,
        "steps_per_generation": batches(training)["gradient_accumulation_steps"],  # all of a step's completions
        "num_generations": training.num_generations,
        "num_iterations": training.num_iterations,
        "max_completion_length": training.max_completion_length,
        "temperature": training.temperature,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": None,
        "repetition_penalty": 1.0,
        "beta": training.beta,
        "epsilon": training.epsilon,
        "epsilon_high": training.epsilon_high,
        "loss_type": training.loss_type,
        "importance_sampling_level": training.importance_sampling_level,
        "entropy_coef": training.entropy_coef,
        "use_adaptive_entropy": False,
        "scale_rewards": training.scale_rewards,
        "multi_objective_aggregation": training.multi_objective_aggregation,
        "reward_weights": list(recipe.data.rewards.values()),
        "mask_truncated_completions": training.mask_truncated_completions,
        "shuffle_dataset": False,  # shuffled in grpo_dataset, so that a resumed run sees the same order
        "disable_dropout": True,
        "use_vllm": training.use_vllm,
        "vllm_mode": "server" if training.vllm_server else "colocate",
        "vllm_server_base_url": training.vllm_server,
        "vllm_gpu_memory_utilization": VLLM_SHARE,
        "vllm_max_model_length": model_block.max_length,
        "vllm_importance_sampling_correction": True,
        "generation_kwargs": {},
        "router_aux_loss_coef": 0.0,
        "chat_template_kwargs": TEMPLATE_OPTIONS,
        "remove_unused_columns": False,
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "optim": training.optim,
        "gradient_checkpointing": training.gradient_checkpointing,
        "save_strategy": "steps",
        "save_steps": training.eval_steps if dev else training.save_steps,
        "save_total_limit": 2 if dev else 1,  # the last one, and the best
        "eval_strategy": "steps" if dev else "no",
        "eval_steps": training.eval_steps if dev else None,
        "num_generations_eval": 1,  # a completion a question, whatever the batch size
        "load_best_model_at_end": dev,
        "metric_for_best_model": "eval_score" if dev else None,
        "greater_is_better": True if dev else None,
        "restore_callback_states_from_checkpoint": True,  # the count of early stopping
        "logging_steps": training.logging_steps,
        "torch_empty_cache_steps": None,
        "eval_accumulation_steps": None,
        "include_num_input_tokens_seen": "no",
        "logging_nan_inf_filter": False,  # malpyeong.training.callbacks looks for them
        "log_completions": True,  # to completions/, for `python -m malpyeong.report run`
        "num_completions_to_print": 0,
        **trackers(training),
        **precision(model_block.dtype),
    }


@click.command(cls=Command)
@click.argument("recipe_file", metavar="RECIPE", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[block.key=value]...")
@click.option("--drop-leaks", is_flag=True, help="Leave the questions of data.dev out of data.train.")
@click.option("--resume", type=click.Choice(["never", "auto"]), default="never", show_default=True)
@click.option("--dry-run", is_flag=True, help="Show the resolved recipe, the batches and the first prompt, and stop.")
def main(recipe_file: Path, overrides: tuple[str, ...], drop_leaks: bool, resume: str, dry_run: bool) -> None:
    """Train a LoRA adapter by GRPO, as RECIPE says."""
    prepare_environment()
    if drop_leaks:
        overrides = (*overrides, "data.drop_leaks=true")
    recipe = load_recipe(recipe_file, overrides, GRPORecipe)
    model_block, training, weights = recipe.model, recipe.training, recipe.data.rewards
    questions = with_prompt_data(load_train(recipe.data), recipe.data)
    functions = functions_of(questions.task, recipe.data)
    if dry_run:
        click.echo("\n".join(preview(recipe, questions)))
        return
    opened = open_run(recipe, resume == "auto")
    if opened is None:
        return
    inputs, checkpoint = opened

    backend = choose_backend(model_block)
    if backend == "unsloth":
        import unsloth  # noqa: F401 -- must come before trl, transformers and peft
    from transformers import EarlyStoppingCallback
    from trl import GRPOConfig, GRPOTrainer

    from malpyeong.decoding.dev import DevScores
    from malpyeong.training.callbacks import Guards, OwnArguments, StepClock, explain_out_of_memory, show_progress
    from malpyeong.training.preflight import check

    check(recipe, backend)
    stated = arguments(recipe, backend)
    config = GRPOConfig(**stated)  # before models: it says which card is this process's, and shards weights
    expected = expected_arguments(config, stated)
    models = load_models(recipe.data.scorer_models, recipe.data.scorers)
    for name, scorer in models.items():
        click.echo(f"{name}: {scorer.weight_bytes / 2**20:.0f} MiB of weights on {scorer.device}")
    with_gold = training.gold_advantage > 0
    rewards = RewardRun(weights, training.num_generations, models, training.min_group_std, functions, with_gold)
    model, tokenizer = load_for_training(model_block, training.seed, training.gradient_checkpointing, training.use_vllm)
    if training.beta and backend == "unsloth":
        keep_reference(model)
    prompts = training.generations * training.groups
    order = training.seed if training.shuffle else None
    dataset = grpo_dataset(tokenizer, questions, model_block.max_length, training.max_completion_length, prompts, order)

    gold: GoldAnswers | None = None
    if with_gold:
        limit = training.max_completion_length
        gold = GoldAnswers(tokenizer, training.num_generations, training.gold_advantage, limit)
    clock = StepClock(rewards)
    callbacks: list[Any] = [clock, Guards(), OwnArguments()]
    dev: DevScores | None = None
    if recipe.data.dev:
        asked, answer = load_questions(recipe.data.dev, recipe.data), training.max_completion_length
        rows, output = training.effective_batch_size, Path(training.output)
        dev = DevScores(tokenizer, asked, model_block.max_length, answer, rows, models, output)
        callbacks.append(dev)
        if training.patience:
            callbacks.append(EarlyStoppingCallback(training.patience))

    class ScoredTrainer(GRPOTrainer):
        def _generate(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 -- as in TRL
            with clock.generating():
                generated = super()._generate(*args, **kwargs)
            return gold.put(generated) if gold else generated

        def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 -- as in TRL
            scores = super()._calculate_rewards(*args, **kwargs)
            return gold.unscored(scores) if gold else scores

        def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
            if gold is None:
                return super()._generate_and_score_completions(inputs)
            gold.asked(inputs)
            return gold.weigh(super()._generate_and_score_completions(inputs), self._logs["advantages"])

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:  # noqa: ANN401
            if "ref" in self.model.peft_config and not (Path(resume_from_checkpoint) / "ref").exists():
                raise InputError(
                    f"{resume_from_checkpoint}: has no reference adapter, its KL was against the base; start again in "
                    "another folder (training.output=…)"
                )
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            if "ref" in self.model.peft_config:  # beta > 0; that one is all that transformers loads
                self.model.load_adapter(resume_from_checkpoint, "default", is_trainable=True)

        def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 -- as in transformers
            return dev.evaluate(self.model) if dev else super().evaluation_loop(*args, **kwargs)

    trainer = ScoredTrainer(
        model=model,
        reward_funcs=rewards.functions,
        args=config,
        train_dataset=dataset,
        eval_dataset=dataset.select([0]) if dev else None,  # asked for, and not looked at
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    check_arguments(trainer.args, expected)
    start = time.perf_counter()
    show_progress(trainer)
    with recorded(trainer, tokenizer, recipe, inputs, checkpoint) as steps_left, explain_out_of_memory(recipe, backend):
        if steps_left:
            announce_compilation(backend)
            if dev and checkpoint is None:
                dev.score_start(trainer.model)
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    share = rewards.seconds / (time.perf_counter() - start)
    steps = counted(trainer.state.global_step, "step")
    click.echo(f"{training.output}/adapter: {steps}; the rewards took {share:.1%} of the time")
    if dev:
        click.echo(dev.line(trainer.state))


if __name__ == "__main__":
    main()
