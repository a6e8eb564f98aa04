"""The blocks and keys of a recipe. How a file becomes one is in ``malpyeong.config.load``."""

import difflib
import math
import re
from collections.abc import Iterable
from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from malpyeong.config.gpu import Gpu

Tracker = Literal["none", "tensorboard", "trackio", "wandb"]
Mode = Literal["plain", "context", "choose_rule", "recall_rule"]

# The rewards that a recipe may name, and the models that they need (``malpyeong.training.rewards`` has the functions).
REWARD_MODELS: dict[str, tuple[str, ...]] = {
    "format": (),
    "exact_match": (),
    "rouge_1": (),
    "bertscore": ("bertscore",),
    "bleurt": ("bleurt",),
    "official": ("bertscore", "bleurt"),
    "choice": (),
    # Of other tasks (malpyeong/tasks) alone.
    "accuracy": (),
    "average_score": (),
    "area_scores": (),
}
# A reward of one's own: FILE.py:FUNCTION.
OWN_REWARD = re.compile(r"(?P<file>.+\.py):(?P<function>[A-Za-z_]\w*)")
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Block(BaseModel):
    """A block of a recipe; a key that it does not know is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class LoraBlock(Block):
    """LoRA adapter: rank, scale and where it goes. Dropout is always 0 (rollouts are sampled in train mode)."""

    r: int = Field(default=64, gt=0)
    alpha: int = Field(default=128, gt=0)
    target_modules: list[str] = Field(default=ALL_LINEAR, min_length=1)


class ModelFacts(Block):
    """A model (folder or hub id), the adapter on it, and what its tokenizer's files get wrong.

    ``eos_token`` and ``pad_token`` replace the tokenizer's own; answers end with the former, and generation stops at
    it. ``tokenizer_json: true`` reads ``tokenizer.json`` as it is, where transformers would put the tokenizer class of
    the architecture in the place of the one that the model was trained with.
    """

    name: str
    adapter: str | None = None
    load_in_4bit: bool = True
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    max_length: int = Field(gt=0)
    eos_token: str | None = None
    pad_token: str | None = None
    tokenizer_json: bool = False


class ModelBlock(ModelFacts):
    """Which model is trained, and how."""

    backend: Literal["auto", "unsloth", "hf"] = "auto"
    lora: LoraBlock = LoraBlock()


class PromptData(Block):
    """What stands in the prompts beside the question.

    ``mode``: ``plain``, the question alone; ``context``, with rules and solved examples; ``choose_rule``, with rules of
    which the model names one before it answers; ``recall_rule`` (SFT), no rules, and it learns to name the right one.
    ``context``: rules and solved examples (``malpyeong.retrieval search``). ``labels``: which rules are right (a file
    of ``malpyeong.prompts.rule_choice``).
    """

    mode: Mode = "plain"
    context: str | None = None
    labels: str | None = None

    @model_validator(mode="after")
    def _files_of_the_mode(self) -> Self:
        for key, modes in (("context", ("context", "choose_rule")), ("labels", ("choose_rule", "recall_rule"))):
            if getattr(self, key) and self.mode not in modes:
                raise ValueError(
                    f"{key} has no place in mode {self.mode}; set data.mode={modes[0]}, or data.{key}=null"
                )
            if not getattr(self, key) and self.mode in modes:
                raise ValueError(f"mode {self.mode} needs data.{key}, a file")
        return self


class TrainingData(PromptData):
    """Contest files: what is trained on, and what is held out. ``dev`` decides which adapter is kept, and when training
    stops; GRPO can do without. ``test`` is only looked at for questions that are in train too. ``drop_leaks`` takes
    those of dev out of train."""

    train: str
    dev: str | None = None
    test: str | None = None
    drop_leaks: bool = False

    @model_validator(mode="after")
    def _knows_what_leaks(self) -> Self:
        if self.drop_leaks and self.dev is None:
            raise ValueError("drop_leaks needs data.dev, the file whose questions must not be in data.train")
        return self


class SFTData(TrainingData):
    """Files of the SFT stage; ``context`` and ``labels`` serve train and dev."""

    dev: str


class SFTTraining(Block):
    """How the SFT stage trains. Dev is looked at every ``eval_steps``: its loss, and with ``best_by: score`` the
    contest's score of its answers too. Training stops when what ``best_by`` names has not got better for ``patience``
    times, and the best adapter is kept."""

    output: str
    report_to: Tracker = "none"
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
    best_by: Literal["loss", "score"] = "loss"
    patience: int = Field(default=3, gt=0)
    logging_steps: int = Field(default=1, gt=0)

    @property
    def effective_batch_size(self) -> int:
        """Records of a step."""
        return self.batch_size * self.gradient_accumulation_steps


class ScorersBlock(Block):
    """Models of the rewards ``bertscore``, ``bleurt`` and ``official``: hub ids or folders, and where they run."""

    bertscore: str | None = None
    bleurt: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"


class GRPOData(TrainingData):
    """Files of the GRPO stage and the weight of each reward: one of ``malpyeong.training.rewards``, or a function of
    one's own as ``my_rewards.py:shortness``. A weight of ``null`` takes out a reward that an earlier file names."""

    rewards: Annotated[
        dict[str, Annotated[float, Field(ge=0)]],
        Field(min_length=1),
        BeforeValidator(
            lambda value: {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value
        ),
    ]
    scorers: ScorersBlock | None = None

    @property
    def scorer_models(self) -> list[str]:
        """The models of ``scorers`` that the rewards need."""
        return sorted({model for name in self.rewards for model in REWARD_MODELS.get(name, ())})

    @property
    def own_rewards(self) -> dict[str, str]:
        """The rewards of one's own: name → file."""
        return {name: own["file"] for name in self.rewards if (own := OWN_REWARD.fullmatch(name))}

    @model_validator(mode="after")
    def _shows_rules(self) -> Self:
        if self.mode == "recall_rule":
            raise ValueError("mode recall_rule is one of SFT; set data.mode=choose_rule")
        return self


class GRPOTraining(Block):
    """How the GRPO stage trains.

    ``shuffle: false`` asks the questions in the order of their file (``recipes/hard_questions.py --easy-first``).
    ``multi_objective_aggregation``: ``sum_then_normalize`` weighs and adds the rewards, then subtracts the group's mean
    and scales (``scale_rewards``); ``normalize_then_sum`` (GDPO, Liu et al. 2026) brings every reward to the same
    standard deviation within the group first. ``min_group_std``: see :class:`malpyeong.training.rewards.RewardRun`.
    ``importance_sampling_level: sequence`` is GSPO's ratio (with ``loss_type: grpo``). ``beta`` weighs the KL
    divergence from the adapter that training starts from, ``entropy_coef`` an entropy bonus. ``gold_advantage`` above 0
    puts the gold answer in the place of each group's last completion, with that advantage
    (``malpyeong/training/gold.py``). ``scale_rewards: none`` with ``sum_then_normalize`` gives RLOO's advantages, times
    (n - 1) / n. ``mask_truncated_completions`` would leave answers that were cut off out of the loss, and with them the
    only penalty on answers without end. ``use_vllm``: sample with vLLM, which keeps its own weights and caches beside
    the trainer's; with ``vllm_server``, the URL of a ``trl vllm-serve``, on other cards (docs/scaling.md).
    With ``data.dev`` the contest's score of its answers is measured every ``eval_steps``, where a checkpoint is written
    (``save_steps`` is for runs without), and the best adapter is kept; training stops when it has not risen for
    ``patience`` times.
    """

    output: str
    report_to: Tracker = "none"
    seed: int = 0
    max_steps: int = Field(gt=0)
    shuffle: bool = True
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
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo"] = "dapo"
    importance_sampling_level: Literal["token", "sequence"] = "token"
    beta: float = Field(default=0.0, ge=0)
    entropy_coef: float = Field(default=0.0, ge=0)
    gold_advantage: float = Field(default=0.0, ge=0)
    scale_rewards: Literal["group", "batch", "none"] = "group"
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "normalize_then_sum"
    min_group_std: float = Field(default=0.01, ge=0)
    mask_truncated_completions: bool = False
    use_vllm: bool = False
    vllm_server: str | None = None
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    optim: str = "adamw_8bit"
    gradient_checkpointing: bool = True
    logging_steps: int = Field(default=1, gt=0)
    save_steps: int = Field(default=25, gt=0)
    eval_steps: int = Field(default=50, gt=0)
    patience: int | None = Field(default=None, gt=0)

    @property
    def effective_batch_size(self) -> int:
        """Completions of a step, which are sampled together."""
        return self.batch_size * self.gradient_accumulation_steps

    @property
    def groups(self) -> int:
        """Questions of a step."""
        return self.effective_batch_size // self.num_generations

    @property
    def generations(self) -> int:
        """How often completions are sampled in the whole run."""
        return math.ceil(self.max_steps / self.num_iterations)

    @model_validator(mode="after")
    def _whole_groups(self) -> "GRPOTraining":
        if self.effective_batch_size % self.num_generations:
            raise ValueError(
                f"batch_size × gradient_accumulation_steps = {self.effective_batch_size} completions a step is not a "
                f"multiple of num_generations = {self.num_generations}"
            )
        if self.gold_advantage and self.num_generations < 3:
            raise ValueError(
                f"gold_advantage takes one of num_generations = {self.num_generations} completions, and the other has "
                "none to be compared with; set num_generations=3 or more"
            )
        if self.vllm_server and not self.use_vllm:
            raise ValueError("vllm_server: needs use_vllm=true")
        if self.loss_type == "cispo" and self.epsilon_high < 1:
            raise ValueError(
                f"loss_type cispo cuts ratios at epsilon_high = {self.epsilon_high}, so that every token would count "
                "less than fully; set epsilon_high=5"
            )
        if self.importance_sampling_level == "sequence" and self.loss_type not in ("grpo", "sapo"):
            raise ValueError(
                f"importance_sampling_level sequence has one ratio a completion, and loss_type {self.loss_type} weighs "
                "tokens; set loss_type=grpo"
            )
        for key in ("save_steps", "eval_steps"):
            if getattr(self, key) % self.num_iterations:
                raise ValueError(
                    f"{key} = {getattr(self, key)} is not a multiple of num_iterations = {self.num_iterations}; a "
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
    """Questions, the rule of each (given or mined labels: ``malpyeong.prompts.rule_choice``), the rule book, and how
    many hard negatives a question gets: the rules other than its own that BM25 ranks first."""

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

    stage: Literal["sft"] = "sft"
    gpu: Gpu | None = None
    model: ModelBlock
    data: SFTData
    training: SFTTraining

    @model_validator(mode="after")
    def _has_answers(self) -> "SFTRecipe":
        if self.training.best_by == "score" and self.data.mode == "recall_rule":
            raise ValueError("training.best_by=score: mode recall_rule has no answers to score; leave it at loss")
        return self


class GRPORecipe(Block):
    """``recipes/grpo.py``."""

    stage: Literal["grpo"] = "grpo"
    gpu: Gpu | None = None
    model: ModelBlock
    data: GRPOData
    training: GRPOTraining

    @model_validator(mode="after")
    def _consistent(self) -> "GRPORecipe":
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
            if name not in REWARD_MODELS and name not in self.data.own_rewards:
                raise ValueError(f"data.rewards.{name}: unknown reward{hint(name, REWARD_MODELS)}")
            if name == "choice" and self.data.mode != "choose_rule":
                raise ValueError("data.rewards.choice: needs data.mode=choose_rule, and data.labels")
            for model in REWARD_MODELS.get(name, ()):
                if getattr(self.data.scorers, model, None) is None:
                    raise ValueError(
                        f"data.rewards.{name}: needs data.scorers.{model}, the hub id or folder of a model"
                    )
        return self


class MiningData(Block):
    """Files of questions with gold answers, and the rule book."""

    questions: Annotated[
        list[str], Field(min_length=1), BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
    ]
    rules: str


class MiningOutput(Block):
    """``share``: of all pairs of questions and rules that are tried. ``top_k`` rules are written for each question.
    ``batch_tokens``: tokens attended to at once, rows × (rule + longest question and answer)."""

    output: str
    share: float = Field(default=0.33, gt=0, le=1)
    top_k: int = Field(gt=0)
    batch_tokens: int = Field(gt=0)


class MiningRecipe(Block):
    """``recipes/mine.py``."""

    stage: Literal["mine"] = "mine"
    model: ModelFacts
    data: MiningData
    mining: MiningOutput


class RetrieverRecipe(Block):
    """``recipes/retriever.py``."""

    stage: Literal["retriever"] = "retriever"
    model: EncoderBlock
    data: RetrieverData
    training: RetrieverTraining


AnyRecipe = Annotated[SFTRecipe | GRPORecipe | MiningRecipe | RetrieverRecipe, Field(discriminator="stage")]


def hint(name: str, known: Iterable[str]) -> str:
    """Return the end of a message about an unknown name: the nearest known one, or all."""
    nearest = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {nearest[0]}?" if nearest else f"; known: {', '.join(known)}"
