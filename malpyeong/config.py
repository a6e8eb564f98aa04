"""Recipe files: YAML with strict keys, overridden on the command line by ``block.key=value``.

A value comes from the first of: the command line, the YAML file, the dial of the card (``gpu``, see
``malpyeong.gpus``), the defaults below. What the models share is a default here, so that a model's YAML says what is
particular to it; the resolved recipe with every key is written into the run's folder.
"""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from malpyeong.errors import InputError
from malpyeong.gpus import Gpu, Stage, detect, dial

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Block(BaseModel):
    """A block of a recipe; a key that it does not know is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class LoraBlock(Block):
    """LoRA adapter: rank, scale and where it goes. Dropout is always 0 (rollouts are sampled in train mode)."""

    r: int = Field(default=64, gt=0)
    alpha: int = Field(default=128, gt=0)
    target_modules: list[str] = Field(default=ALL_LINEAR, min_length=1)


class ModelBlock(Block):
    """Which model is trained, how it is held in memory, and what its tokenizer's files get wrong.

    ``eos_token`` and ``pad_token`` replace the tokenizer's own; answers end with the former, and generation stops at
    it. ``tokenizer_json: true`` reads ``tokenizer.json`` as it is, where transformers would put the tokenizer class of
    the architecture in the place of the one that the model was trained with.
    """

    name: str
    adapter: str | None = None
    backend: Literal["auto", "unsloth", "hf"] = "auto"
    load_in_4bit: bool = True
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    max_length: int = Field(gt=0)
    eos_token: str | None = None
    pad_token: str | None = None
    tokenizer_json: bool = False
    lora: LoraBlock = LoraBlock()


class PromptData(Block):
    """What stands in the prompts beside the question.

    ``context``: rules and solved examples (``malpyeong.retrieval search``). ``labels``: which rules are right (a file
    of ``malpyeong.choice``); the model then names one of the context's rules before it answers.
    """

    context: str | None = None
    labels: str | None = None

    @model_validator(mode="after")
    def _rules_to_choose_among(self) -> Self:
        self.check_rules()
        return self

    def check_rules(self) -> None:
        """Make sure that there are rules to choose among where one is to be chosen (ValueError)."""
        if self.labels and not self.context:
            raise ValueError("labels need data.context, the rules to choose among")


class SFTData(PromptData):
    """Files of the SFT stage; ``context`` and ``labels`` serve both.

    ``recall: true`` is a stage before the usual SFT, for a small model that is to choose among rules: none are shown,
    and it learns to name, from the question alone, the one that ``labels`` says is best.
    """

    train: str
    dev: str
    recall: bool = False

    def check_rules(self) -> None:
        """With ``recall``: make sure that there are labels and no context; else as without (ValueError)."""
        if not self.recall:
            super().check_rules()
        elif self.context or not self.labels:
            raise ValueError("recall needs data.labels, and shows no rules: set data.context=null")


class SFTTraining(Block):
    """How the SFT stage trains. Dev loss is measured every ``eval_steps``; training stops when it has not
    fallen for ``patience`` measurements, and the best adapter is kept."""

    output: str
    seed: int = 0
    epochs: float = Field(gt=0)
    learning_rate: float = Field(gt=0)
    warmup_steps: int = Field(default=10, ge=0)
    batch_size: int = Field(gt=0)
    gradient_accumulation_steps: int = Field(gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    optim: str = "adamw_8bit"
    gradient_checkpointing: bool = True
    eval_steps: int = Field(default=20, gt=0)
    patience: int = Field(default=3, gt=0)
    logging_steps: int = Field(default=1, gt=0)


class ScorersBlock(Block):
    """Models of the rewards ``bertscore``, ``bleurt`` and ``official``: hub ids or folders, and where they run."""

    bertscore: str | None = None
    bleurt: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"


class GRPOData(PromptData):
    """Files of the GRPO stage and the weight of each reward (see ``malpyeong.rewards``)."""

    train: str
    rewards: dict[str, Annotated[float, Field(ge=0)]] = Field(min_length=1)
    scorers: ScorersBlock | None = None


class GRPOTraining(Block):
    """How the GRPO stage trains.

    ``multi_objective_aggregation``: ``sum_then_normalize`` weighs and adds the rewards, then subtracts the group's mean
    and scales (``scale_rewards``); ``normalize_then_sum`` (GDPO, Liu et al. 2026) brings every reward to the same
    spread within the group first. ``min_spread``: see :class:`malpyeong.rewards.RewardRun`.
    ``mask_truncated_completions`` would leave answers that were cut off out of the loss, and with them the only penalty
    on answers without end. ``use_vllm``: sample with vLLM, which keeps its own weights and caches beside the trainer's.
    """

    output: str
    seed: int = 0
    max_steps: int = Field(gt=0)
    learning_rate: float = Field(gt=0)
    lr_scheduler_type: Literal["constant_with_warmup", "linear"] = "constant_with_warmup"
    warmup_steps: int = Field(default=10, ge=0)
    batch_size: int = Field(gt=0)
    gradient_accumulation_steps: int = Field(gt=0)
    num_generations: int = Field(ge=2)
    num_iterations: int = Field(default=1, gt=0)
    max_completion_length: int = Field(gt=0)
    temperature: float = Field(default=1.0, gt=0)
    epsilon: float = Field(default=0.2, gt=0)
    epsilon_high: float = Field(default=0.28, gt=0)
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo"] = "dapo"
    scale_rewards: Literal["group", "batch", "none"] = "group"
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "normalize_then_sum"
    min_spread: float = Field(default=0.01, ge=0)
    mask_truncated_completions: bool = False
    use_vllm: bool = False
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    optim: str = "adamw_8bit"
    gradient_checkpointing: bool = True
    logging_steps: int = Field(default=1, gt=0)
    save_steps: int = Field(default=25, gt=0)

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
    """Questions, the rule of each (given or mined labels: a file of ``malpyeong.choice``), the rule book, and how many
    hard negatives a question gets: the rules other than its own that BM25 ranks first."""

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

    gpu: Gpu | None = None
    model: ModelBlock
    data: SFTData
    training: SFTTraining


class GRPORecipe(Block):
    """``recipes/grpo.py``."""

    gpu: Gpu | None = None
    model: ModelBlock
    data: GRPOData
    training: GRPOTraining

    @model_validator(mode="after")
    def _consistent(self) -> "GRPORecipe":
        from malpyeong.rewards import NEEDS, REWARDS

        if self.training.max_completion_length >= self.model.max_length:
            raise ValueError(
                f"training.max_completion_length = {self.training.max_completion_length} leaves no room for a prompt "
                f"within model.max_length = {self.model.max_length}"
            )
        if self.training.use_vllm and self.gpu == "t4":
            raise ValueError("training.use_vllm: vLLM is not reliable on a T4; leave it out there")

        if not any(self.data.rewards.values()):
            raise ValueError("data.rewards: every weight is 0; nothing would be learnt")
        for name in self.data.rewards:
            if name not in REWARDS:
                raise ValueError(f"data.rewards.{name}: unknown reward{_hint(name, REWARDS)}")
            if name == "choice" and not self.data.labels:
                raise ValueError("data.rewards.choice: needs data.labels, a file that says which rules are right")
            for model in NEEDS.get(name, ()):
                if getattr(self.data.scorers, model, None) is None:
                    raise ValueError(
                        f"data.rewards.{name}: needs data.scorers.{model}, the hub id or folder of a model"
                    )
        return self


class MiningModel(Block):
    """Whose perplexity is measured: a folder or hub id, with a LoRA adapter on it or without."""

    name: str
    adapter: str | None = None
    load_in_4bit: bool
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    max_length: int = Field(gt=0)


class MiningData(Block):
    """Files of questions with gold answers, the rule book, and a context file (``malpyeong.retrieval search``) that
    says which rules to try for each; None: every rule."""

    questions: Annotated[
        list[str], Field(min_length=1), BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
    ]
    rules: str
    context: str | None = None


class MiningOutput(Block):
    """``top_k`` rules are written for each question. ``batch_tokens``: tokens attended to at once, rows × (rule +
    longest question and answer)."""

    output: str
    top_k: int = Field(gt=0)
    batch_tokens: int = Field(gt=0)


class MiningRecipe(Block):
    """``recipes/mine_contexts.py``."""

    model: MiningModel
    data: MiningData
    mining: MiningOutput


class RetrieverRecipe(Block):
    """``recipes/train_retriever.py``."""

    model: EncoderBlock
    data: RetrieverData
    training: RetrieverTraining


Recipe = TypeVar("Recipe", bound=Block)


def stage_of(kind: type[Block]) -> Stage:
    """Return which of the dial's tables a kind of recipe takes."""
    return "grpo" if kind is GRPORecipe else "sft"


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
    if values.get("gpu") == "auto":
        values["gpu"] = detect()
    _fill(values, dial(values.get("gpu"), stage_of(kind)))
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


def _fill(values: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Add what is not stated, block by block; a block that the recipe does not have stays away."""
    for key, default in defaults.items():
        if not isinstance(default, dict):
            values.setdefault(key, default)
        elif isinstance(values.get(key), dict):
            _fill(values[key], default)


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
