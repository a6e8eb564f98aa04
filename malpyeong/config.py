"""Recipe files: YAML with strict keys, overridden on the command line by ``block.key=value``."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from malpyeong.errors import InputError


class Block(BaseModel):
    """A block of a recipe; a key that it does not know is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class LoraBlock(Block):
    """LoRA adapter: rank, scale and where it goes. Dropout is always 0 (rollouts are sampled in train mode)."""

    r: int = Field(gt=0)
    alpha: int = Field(gt=0)
    target_modules: list[str] = Field(min_length=1)


class ModelBlock(Block):
    """Which model is trained, and how it is held in memory."""

    name: str
    adapter: str | None = None
    backend: Literal["auto", "unsloth", "hf"] = "auto"
    load_in_4bit: bool
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    max_length: int = Field(gt=0)
    lora: LoraBlock


class SFTData(Block):
    """Files of the SFT stage. ``context``: rules and examples for both files (``malpyeong.retrieval search``)."""

    train: str
    dev: str
    context: str | None = None


class SFTTraining(Block):
    """How the SFT stage trains. Dev loss is measured every ``eval_steps``; training stops when it has not
    fallen for ``patience`` measurements, and the best adapter is kept."""

    output: str
    seed: int
    epochs: float = Field(gt=0)
    learning_rate: float = Field(gt=0)
    warmup_steps: int = Field(ge=0)
    batch_size: int = Field(gt=0)
    gradient_accumulation_steps: int = Field(gt=0)
    weight_decay: float = Field(ge=0)
    max_grad_norm: float = Field(gt=0)
    optim: str
    gradient_checkpointing: bool
    eval_steps: int = Field(gt=0)
    patience: int = Field(gt=0)
    logging_steps: int = Field(gt=0)


class ScorersBlock(Block):
    """Models of the rewards ``bertscore``, ``bleurt`` and ``official``: hub ids or folders, and where they run."""

    bertscore: str | None = None
    bleurt: str | None = None
    device: Literal["auto", "cpu", "cuda"]
    dtype: Literal["float32", "float16", "bfloat16"]


class GRPOData(Block):
    """Files of the GRPO stage and the weight of each reward (see ``malpyeong.rewards``). ``context``: rules and solved
    examples for the prompts (``malpyeong.retrieval search``)."""

    train: str
    context: str | None = None
    rewards: dict[str, Annotated[float, Field(ge=0)]] = Field(min_length=1)
    scorers: ScorersBlock | None = None


class GRPOTraining(Block):
    """How the GRPO stage trains.

    ``multi_objective_aggregation``: ``sum_then_normalize`` weighs and adds the rewards, then subtracts the group's mean
    and scales (``scale_rewards``); ``normalize_then_sum`` (GDPO, Liu et al. 2026) brings every reward to the same
    spread within the group first. ``min_spread``: see :class:`malpyeong.rewards.RewardRun`.
    """

    output: str
    seed: int
    max_steps: int = Field(gt=0)
    learning_rate: float = Field(gt=0)
    warmup_steps: int = Field(ge=0)
    batch_size: int = Field(gt=0)
    gradient_accumulation_steps: int = Field(gt=0)
    num_generations: int = Field(ge=2)
    num_iterations: int = Field(gt=0)
    max_completion_length: int = Field(gt=0)
    temperature: float = Field(gt=0)
    epsilon: float = Field(gt=0)
    epsilon_high: float = Field(gt=0)
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo"]
    scale_rewards: Literal["group", "batch", "none"]
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"]
    min_spread: float = Field(ge=0)
    mask_truncated_completions: bool
    weight_decay: float = Field(ge=0)
    max_grad_norm: float = Field(gt=0)
    optim: str
    gradient_checkpointing: bool
    logging_steps: int = Field(gt=0)
    save_steps: int = Field(gt=0)

    @model_validator(mode="after")
    def _whole_groups(self) -> "GRPOTraining":
        rollouts = self.batch_size * self.gradient_accumulation_steps
        if rollouts % self.num_generations:
            raise ValueError(
                f"batch_size × gradient_accumulation_steps = {rollouts} completions a step is not a multiple "
                f"of num_generations = {self.num_generations}"
            )
        if self.save_steps % self.num_iterations:
            raise ValueError(
                f"save_steps = {self.save_steps} is not a multiple of num_iterations = {self.num_iterations}; a "
                "checkpoint between two uses of the same completions could not be resumed"
            )
        return self


class EncoderBlock(Block):
    """The model that becomes a text encoder: a sentence-transformers model, or any other with mean pooling over it.
    Without ``lora`` all weights are trained."""

    name: str
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    max_length: int = Field(gt=0)
    lora: LoraBlock | None = None


class RetrieverData(Block):
    """Questions, the rule of each (record id → rule id), the rule book, and how many hard negatives a question gets:
    the rules other than its own that BM25 ranks first."""

    train: str
    labels: str
    rules: str
    negatives: int = Field(ge=0)


class RetrieverTraining(Block):
    """How the dual encoder trains. ``scale`` multiplies the cosine in the softmax over a batch's rules."""

    output: str
    seed: int
    epochs: float = Field(gt=0)
    learning_rate: float = Field(gt=0)
    warmup_steps: int = Field(ge=0)
    batch_size: int = Field(ge=2)
    scale: float = Field(gt=0)
    weight_decay: float = Field(ge=0)
    max_grad_norm: float = Field(gt=0)
    optim: str
    logging_steps: int = Field(gt=0)
    save_steps: int = Field(gt=0)


class SFTRecipe(Block):
    """``recipes/sft.py``."""

    model: ModelBlock
    data: SFTData
    training: SFTTraining


class GRPORecipe(Block):
    """``recipes/grpo.py``."""

    model: ModelBlock
    data: GRPOData
    training: GRPOTraining

    @model_validator(mode="after")
    def _known_rewards(self) -> "GRPORecipe":
        from malpyeong.rewards import NEEDS, REWARDS

        if not any(self.data.rewards.values()):
            raise ValueError("data.rewards: every weight is 0; nothing would be learnt")
        for name in self.data.rewards:
            if name not in REWARDS:
                raise ValueError(f"data.rewards.{name}: unknown reward{_hint(name, REWARDS)}")
            for model in NEEDS.get(name, ()):
                if getattr(self.data.scorers, model, None) is None:
                    raise ValueError(
                        f"data.rewards.{name}: needs data.scorers.{model}, the hub id or folder of a model"
                    )
        return self


class RetrieverRecipe(Block):
    """``recipes/train_retriever.py``."""

    model: EncoderBlock
    data: RetrieverData
    training: RetrieverTraining


Recipe = TypeVar("Recipe", bound=Block)


def load_recipe(path: str | Path, overrides: Sequence[str], kind: type[Recipe]) -> Recipe:
    """Read a recipe file and apply overrides such as ``training.learning_rate=1e-4``.

    Raises:
        InputError: the file is not YAML, a key is unknown (the nearest known one is named), a value is missing
            or out of range.
    """
    try:
        values = yaml.safe_load(Path(path).read_text("utf-8"))
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); name a recipe such as recipes/tiny/sft.yaml"
        ) from None
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{path}: is not YAML ({error})") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: holds no blocks; expected {', '.join(kind.model_fields)}")
    for override in overrides:
        _apply(values, override)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{path}: {_explain(error, kind)}") from None


def _apply(values: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise InputError(f'"{override}": write an override as block.key=value, like training.seed=1')
    *blocks, key = name.split(".")
    for block in blocks:
        values = values.setdefault(block, {})
        if not isinstance(values, dict):
            raise InputError(f'"{override}": "{block}" is not a block')
    values[key] = _value(override, text)


def _value(override: str, text: str) -> Any:  # noqa: ANN401 -- what YAML gives
    """Lists and mappings are YAML; anything else is taken as it stands and turned into the key's type later."""
    if text in ("null", "~"):
        return None
    if not text.startswith(("[", "{")):
        return text
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        raise InputError(f'"{override}": the value is not YAML') from None


def _explain(error: ValidationError, kind: type[Block]) -> str:
    problem = error.errors()[0]
    place = [str(part) for part in problem["loc"]]
    name = ".".join(place)
    if problem["type"] == "extra_forbidden":
        return f"{name}: unknown key{_hint(place[-1], _fields_at(kind, place[:-1]))}"
    if problem["type"] == "missing":
        return f"{name}: is missing; add it"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{name}: {message}" if name else message


def _fields_at(kind: type[Block], place: Sequence[str]) -> list[str]:
    for part in place:
        annotation = kind.model_fields[part].annotation
        blocks = [
            one for one in (annotation, *get_args(annotation)) if isinstance(one, type) and issubclass(one, Block)
        ]
        if not blocks:
            return []
        kind = blocks[0]
    return list(kind.model_fields)


def _hint(name: str, known: Any) -> str:  # noqa: ANN401 -- any iterable of names
    nearest = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {nearest[0]}?" if nearest else f"; known: {', '.join(known)}"
