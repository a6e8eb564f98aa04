"""How much of a GPU's memory a recipe needs: arithmetic on the model's shape, before anything is loaded.

An estimate of what tensors hold at the fullest moment, part by part. The parts that stay (weights, adapter with its
optimizer, scorers, vLLM's share) are added up; of the two moments that alternate, sampling (KV caches) and the update
(gradients, activations and logits), the fuller one counts. Not counted: the allocator's fragmentation, for which
``RESERVE`` is kept free, and the CUDA context, which ``USABLE_GIB`` leaves out.

``tests/models/test_memory.py`` compares it with the peak that TRL's trainers reach on a CPU, and, for Unsloth, with
the peaks that were measured on a GPU (``benchmarks/results/``); how vLLM's share adds up has not been measured.

    python -m malpyeong.models.memory recipes/grpo.yaml recipes/models/*.yaml     (a table of models and cards)
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from malpyeong.config.gpu import USABLE_GIB
from malpyeong.errors import InputError
from malpyeong.terminal import Command

if TYPE_CHECKING:
    from malpyeong.config.recipe import GRPORecipe, SFTRecipe

# NF4 with double quantisation (Dettmers et al. 2023, QLoRA): 4 bits a weight, an 8-bit constant for each 64 weights,
# and a 32-bit constant for each 256 of those.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
GIB = 2**30
RESERVE = 0.08  # of the card, for fragmentation: 0.2 to 1.2 GiB where it was measured
WORKSPACE = int(0.3 * GIB)  # cuBLAS's workspaces, rotary tables, Unsloth's buffers: 0.2 to 0.3 GiB where measured
VLLM_SHARE = 0.4  # of the card's memory, for vLLM's weights and caches where it samples
CHUNK = 256  # tokens whose logits TRL's chunked loss holds at once
UNSLOTH_CHUNK = 512  # the same for Unsloth's, in float32 and with their gradient
# Unsloth's decoding buffers: what they hold beyond the prompt at first, and what their rows are a multiple of.
UNSLOTH_GROWTH, UNSLOTH_ROWS = 513, 256
# A logit's bytes by those of a number: itself, float32 copies of it, its softmax and gradient (counted on CPU runs).
_GRPO_LOGITS = {4: 16, 2: 14}

Stage = Literal["sft", "grpo"]
Backend = Literal["unsloth", "hf"]
BACKENDS: tuple[Backend, ...] = ("unsloth", "hf")
AnyRecipe = TypeVar("AnyRecipe", bound="SFTRecipe | GRPORecipe")


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder of the Llama family (Llama, Qwen2, Qwen3): grouped-query attention and a gated MLP."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool

    @classmethod
    def of(cls, config: Any) -> "ModelShape":  # noqa: ANN401 -- a transformers configuration
        """Read the shape from a model's configuration."""
        return cls(
            hidden=config.hidden_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            intermediate=config.intermediate_size,
            vocabulary=config.vocab_size,
            tied=bool(config.tie_word_embeddings),
        )

    def linears(self) -> dict[str, tuple[int, int]]:
        """Return (inputs, outputs) of each linear layer of a block, by the name that LoRA's targets have."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, queries),
            "k_proj": (self.hidden, keys),
            "v_proj": (self.hidden, keys),
            "o_proj": (queries, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    @property
    def block_parameters(self) -> int:
        """Weights of all blocks' linear layers: what 4-bit loading quantises."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.linears().values())

    @property
    def other_parameters(self) -> int:
        """Embedding, output layer and norms, which 4-bit loading leaves alone."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2) + (2 * self.layers + 1) * self.hidden

    def lora_parameters(self, rank: int, targets: Sequence[str]) -> int:
        """Weights of an adapter: ``rank`` × (inputs + outputs) for each layer that it is on."""
        return self.layers * rank * sum(sum(size) for name, size in self.linears().items() if name in targets)


# As read from public copies of the models' config.json or reckoned from published sizes, for looking before a download;
# with the model at hand the doctor reads its config.json.
SHAPES = {
    "Qwen/Qwen3-4B": ModelShape(2560, 36, 32, 8, 128, 9728, 151_936, True),
    "Qwen/Qwen3-8B": ModelShape(4096, 36, 32, 8, 128, 12_288, 151_936, False),
    "kakaocorp/kanana-1.5-8b-instruct-2505": ModelShape(4096, 32, 32, 8, 128, 14_336, 128_256, False),
    "K-intelligence/Midm-2.0-Base-Instruct": ModelShape(4096, 48, 32, 8, 128, 14_336, 131_384, False),
    "K-intelligence/Midm-2.0-Mini-Instruct": ModelShape(1792, 48, 32, 8, 128, 4608, 131_392, True),
    "skt/A.X-4.0-Light": ModelShape(3584, 28, 28, 4, 128, 18_944, 102_400, False),
    "naver-hyperclovax/HyperCLOVAX-SEED-Text-Instruct-1.5B": ModelShape(2048, 24, 16, 8, 128, 7168, 110_592, True),
}


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes by part.

    Attributes:
        weights: the base model.
        adapter: LoRA weights in float32, a 16-bit copy of them, and the optimizer's state.
        scorers: BERTScore's and BLEURT's networks, where they are on the GPU.
        vllm: what vLLM holds for itself.
        workspace: what libraries and kernels keep.
        kv_cache: keys and values of all completions that are sampled together, at full length (GRPO).
        sampling: what it takes to fill them: one token's logits for each, or, where that is more than what the caches
            still grow by, reading all prompts at once (GRPO).
        gradients: of the adapter; there are none while completions are sampled.
        activations: what a micro-batch's forward pass keeps for the backward pass.
        one_block: what the backward pass through one block adds to it (with gradient checkpointing, all of the block).
        logits: logits of one micro-batch, with their gradient and softmax; gone before the first block's turn.
    """

    weights: int
    adapter: int
    scorers: int
    vllm: int
    workspace: int
    kv_cache: int
    sampling: int
    gradients: int
    activations: int
    one_block: int
    logits: int

    @property
    def update(self) -> int:
        """Bytes of the update alone."""
        return self.gradients + self.activations + max(self.one_block, self.logits)

    @property
    def rollout(self) -> int:
        """Bytes of sampling alone."""
        return self.kv_cache + self.sampling

    @property
    def peak(self) -> int:
        """Bytes at the fullest moment."""
        stays = self.weights + self.adapter + self.scorers + self.vllm + self.workspace
        return stays + max(self.update, self.rollout)

    def fits(self, gib: float) -> bool:
        """Whether it fits a card, with ``RESERVE`` left free."""
        return self.peak <= gib * GIB * (1 - RESERVE)

    def table(self) -> str:
        """Return the parts in GiB on one line, the largest first."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        shown = sorted((part for part in parts.items() if part[1] >= 0.05 * GIB), key=lambda part: -part[1])
        return ", ".join(f"{name.replace('_', ' ')} {size / GIB:.1f}" for name, size in shown)


def estimate(
    shape: ModelShape,
    *,
    stage: Stage,
    max_length: int,
    batch_size: int,
    max_completion_length: int = 0,
    completions: int = 0,
    load_in_4bit: bool = True,
    dtype_bytes: int = 2,
    rank: int = 64,
    targets: Sequence[str] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    optim: str = "adamw_8bit",
    reference_adapter: bool = False,
    gradient_checkpointing: bool = True,
    backend: Backend = "hf",
    scorer_bytes: int = 0,
    vllm_bytes: int = 0,
    workspace: int = 0,
) -> Estimate:
    """Return the memory that training takes.

    Args:
        shape: of the base model.
        stage: ``sft`` or ``grpo``.
        max_length: tokens of prompt and answer together.
        batch_size: sequences of a micro-batch.
        max_completion_length: tokens of an answer (GRPO).
        completions: answers that are sampled together: ``batch_size × gradient_accumulation_steps`` (GRPO).
        load_in_4bit: whether the blocks' linear layers are NF4.
        dtype_bytes: of a number: 2 for float16 and bfloat16, 4 for float32.
        rank: of the LoRA adapter.
        targets: layers that the adapter is on.
        optim: the optimizer's name; an ``8bit`` one keeps two bytes a weight, others eight.
        reference_adapter: whether the adapter's weights are held a second time, for a KL divergence (GRPO).
        gradient_checkpointing: keep only each block's input, and compute a block again when its gradient is due.
        backend: Unsloth moves the kept inputs to the computer's memory and never holds a micro-batch's logits.
        scorer_bytes: of the scorers' networks on the GPU.
        vllm_bytes: vLLM's share of the card, if it samples: weights, LoRA and caches. Unsloth trains on these weights.
        workspace: what libraries and kernels keep.
    """
    weights = shape.block_parameters * (NF4_BYTES if load_in_4bit else dtype_bytes)
    # PEFT's preparation of 4-bit models holds all other weights in float32; Unsloth leaves them as they are.
    weights += shape.other_parameters * (4 if load_in_4bit and backend == "hf" else dtype_bytes)
    if load_in_4bit:  # one layer is held dequantised while it is used
        weights += dtype_bytes * max(inputs * outputs for inputs, outputs in shape.linears().values())
    # In 16 bits autocast keeps a copy of the adapter while a micro-batch is computed; Unsloth makes one for decoding,
    # and keeps it until the next.
    copied = dtype_bytes if dtype_bytes == 2 and (backend == "hf" or stage == "grpo") else 0
    lora = shape.lora_parameters(rank, targets)
    adapter = lora * (4 + (2 if "8bit" in optim else 8) + copied + 4 * reference_adapter)

    tokens = batch_size * max_length
    block, passing = (tokens * size for size in _block_bytes(shape, rank, targets, dtype_bytes, backend))
    block_input = tokens * shape.hidden * dtype_bytes
    if not gradient_checkpointing:
        activations, one_block = shape.layers * block, passing
    else:
        activations, one_block = (2 if backend == "unsloth" else shape.layers) * block_input, block + passing

    if backend == "unsloth":
        logits = (4 + 4) * min(UNSLOTH_CHUNK, tokens) * shape.vocabulary
    elif stage == "sft":
        # Logits of the chunk in float32, their log-softmax, its exponential, and the gradient.
        logits = 4 * 4 * min(CHUNK, tokens) * shape.vocabulary
    else:
        logits = _GRPO_LOGITS[dtype_bytes] * batch_size * (max_completion_length + 1) * shape.vocabulary
    kv_cache = sampling = vllm = 0
    if vllm_bytes:
        vllm = max(0, vllm_bytes - int(weights)) if backend == "unsloth" else vllm_bytes
    elif stage == "grpo":
        prompt = max_length - max_completion_length
        cache_token = 2 * shape.kv_heads * shape.head_dim * dtype_bytes
        prefilled = completions * prompt * cache_token * shape.layers
        if backend == "unsloth":
            # Decoding has buffers of its own, with attention's scores, and the prompts' caches stay until all blocks
            # have copied theirs. Longer completions make the buffers grow, block by block.
            row = completions * (cache_token + shape.heads * dtype_bytes)
            first, last = (_round_up(prompt + more) for more in (UNSLOTH_GROWTH, max_completion_length + 1))
            kv_cache = max(prefilled + first * row * shape.layers, last * row * (shape.layers + 1))
        else:
            # A block's cache is copied when it grows by a token, so that one block is held twice.
            kv_cache = completions * max_length * cache_token * (shape.layers + 1)
        # All prompts are read at once: four tensors of the MLP and two of the hidden size, where autocast's float32
        # copies come on top. The caches are then short of the completions.
        prefill = completions * prompt * (4 * dtype_bytes * shape.intermediate + 2 * dtype_bytes * shape.hidden)
        if dtype_bytes == 2 and backend == "hf":
            prefill += completions * prompt * 4 * shape.intermediate
        growth = kv_cache - prefilled
        sampling = max(completions * shape.vocabulary * (dtype_bytes + 3 * 4), prefill - growth)
    return Estimate(
        weights=int(weights),
        adapter=adapter,
        scorers=scorer_bytes,
        vllm=vllm,
        workspace=workspace,
        kv_cache=kv_cache,
        sampling=sampling,
        gradients=4 * lora,
        activations=activations,
        one_block=one_block,
        logits=logits,
    )


def _round_up(rows: int) -> int:
    return -(-rows // UNSLOTH_ROWS) * UNSLOTH_ROWS


def _block_bytes(
    shape: ModelShape, rank: int, targets: Sequence[str], dtype_bytes: int, backend: Backend
) -> tuple[int, int]:
    """Return the bytes a token that one block keeps for its backward pass, and what that pass adds at its fullest.

    Counted on CPU runs of Qwen3 with LoRA (one dimension changed at a time). In float32 a block keeps four tensors of
    the hidden size (inputs of the norms and of the layers after them), four of the MLP's (gate, its activation, up,
    their product), three of the queries' and keys' (before and after rotation, and attention's own), and LoRA's inner
    vectors. In 16 bits the norms and the adapter keep float32 copies besides, but not Unsloth's.
    """
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    kept = dtype_bytes * (4 * shape.hidden + 4 * shape.intermediate + 3 * queries + 3 * keys + rank * len(targets))
    passing = dtype_bytes * 2 * shape.intermediate
    if dtype_bytes == 2 and backend == "hf":
        kept += 10 * shape.hidden + 4 * queries + 2 * keys
        passing += 2 * shape.intermediate + 8 * shape.hidden
    return kept, passing


# BERTScore's encoder (nine of mBERT's layers) and BLEURT-20, in weights.
SCORER_PARAMETERS = {"bertscore": 156_000_000, "bleurt": 579_000_000}


def estimate_recipe(
    recipe: "SFTRecipe | GRPORecipe", shape: ModelShape, backend: Backend, gib: float | None = None
) -> Estimate:
    """Return the memory that a recipe takes on a GPU.

    Args:
        recipe: resolved.
        shape: of its base model.
        backend: that will be used.
        gib: of the card, of which vLLM takes its share; None for what the recipe's ``gpu`` has, or else 24gb.
    """
    from malpyeong.config.recipe import GRPORecipe

    model, training = recipe.model, recipe.training
    sizes: dict[str, Any] = {}
    if isinstance(recipe, GRPORecipe):
        scorers, needed = recipe.data.scorers, recipe.data.scorer_models
        width = 4 if scorers is None or scorers.dtype == "float32" else 2
        on_card = scorers is not None and scorers.device != "cpu"
        sizes = {
            "max_completion_length": recipe.training.max_completion_length,
            "completions": training.effective_batch_size,
            "reference_adapter": recipe.training.beta > 0,
            "scorer_bytes": sum(SCORER_PARAMETERS[name] * width for name in needed) if on_card else 0,
        }
        if recipe.training.vllm_server:
            sizes["completions"] = 0  # sampled on another card
        elif recipe.training.use_vllm:
            sizes["vllm_bytes"] = int(VLLM_SHARE * (gib or USABLE_GIB[recipe.gpu or "24gb"]) * GIB)
    return estimate(
        shape,
        stage="grpo" if isinstance(recipe, GRPORecipe) else "sft",
        max_length=model.max_length,
        batch_size=training.batch_size,
        load_in_4bit=model.load_in_4bit,
        dtype_bytes=4 if model.dtype == "float32" else 2,
        rank=model.lora.r,
        targets=model.lora.target_modules,
        optim=training.optim,
        gradient_checkpointing=training.gradient_checkpointing,
        backend=backend,
        workspace=WORKSPACE,
        **sizes,
    )


def next_lever(
    recipe: "SFTRecipe | GRPORecipe", shape: ModelShape, backend: Backend, gib: float
) -> tuple[list[str], Estimate]:
    """Return the overrides that make a recipe fit a card, and the estimate with them.

    What costs no quality is tried first (a smaller micro-batch, checkpointing, scorers on the CPU), then what changes
    training (fewer completions a step, shorter prompts, a smaller adapter). The first that suffices is taken; where
    none does, the one that frees the most, and then another on top of it. What comes back may still not fit.

    Raises:
        ValueError: nothing that is left frees anything.
    """
    pulled: dict[str, Any] = {}
    now = estimate_recipe(recipe, shape, backend, gib)
    while not pulled or not now.fits(gib):
        tried = []
        for lever in _levers(recipe):
            changed = with_values(recipe, lever)
            tried.append((estimate_recipe(changed, shape, backend, gib), changed, lever))
        tried = [one for one in tried if one[0].peak < now.peak]
        if not tried:
            break
        fitting = [one for one in tried if one[0].fits(gib)]
        now, recipe, lever = fitting[0] if fitting else min(tried, key=lambda one: one[0].peak)
        pulled |= lever
    if not pulled:
        raise ValueError("no lever is left")
    return [f"{name}={str(value).lower()}" for name, value in pulled.items()], now


def lever_text(recipe: "SFTRecipe | GRPORecipe", shape: ModelShape, backend: Backend, gib: float) -> str:
    """Return what to change where a recipe does not fit a card of ``gib`` GiB."""
    try:
        overrides, then = next_lever(recipe, shape, backend, gib)
    except ValueError:
        return "take a smaller model"
    if any(override.startswith("model.lora.") for override in overrides):
        overrides = [*overrides, "(in both stages)"]
    more = "" if then.fits(gib) else ", which does not suffice alone; then a smaller model"
    return f"{' '.join(overrides)} brings it to {then.peak / GIB:.1f} GiB{more}"


def shape_of(name: str) -> ModelShape | None:
    """Return a model's shape from its config.json or the list of known ones, or None."""
    from transformers import AutoConfig

    try:
        return ModelShape.of(AutoConfig.from_pretrained(name))
    except (OSError, ValueError, AttributeError):
        return SHAPES.get(name)


@contextmanager
def out_of_memory(advice: str, error: type[click.ClickException] = InputError) -> Iterator[None]:
    """Turn a GPU's out-of-memory error into ``error``, one line with the measured peak and ``advice``."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError:
        peak, whole = torch.cuda.max_memory_allocated() / GIB, torch.cuda.mem_get_info()[1] / GIB
        raise error(f"the GPU's memory does not suffice (peak {peak:.1f} GiB of {whole:.1f}); {advice}") from None


def _levers(recipe: "SFTRecipe | GRPORecipe") -> list[dict[str, Any]]:
    from malpyeong.config.recipe import GRPORecipe

    model, training = recipe.model, recipe.training
    batch, accumulation = training.batch_size, training.gradient_accumulation_steps
    levers: list[dict[str, Any]] = []
    smaller = batch
    while smaller % 2 == 0:
        smaller //= 2
        steps = accumulation * batch // smaller
        levers.append({"training.batch_size": smaller, "training.gradient_accumulation_steps": steps})
    if not training.gradient_checkpointing:
        levers.append({"training.gradient_checkpointing": True})
    if not model.load_in_4bit:
        levers.append({"model.load_in_4bit": True})
    if isinstance(recipe, GRPORecipe):
        if recipe.training.use_vllm:
            levers.append({"training.use_vllm": False})
        if recipe.data.scorers is not None and recipe.data.scorers.device != "cpu":
            levers.append({"data.scorers.device": "cpu"})
        group = recipe.training.num_generations
        fewer = accumulation
        while fewer % 2 == 0 and batch * fewer // 2 % group == 0:
            fewer //= 2
            levers.append({"training.gradient_accumulation_steps": fewer})
        if group % 2 == 0 and group > 4 and accumulation % 2 == 0:
            levers.append(
                {"training.num_generations": group // 2, "training.gradient_accumulation_steps": accumulation // 2}
            )
    if model.max_length > 1024:
        levers.append({"model.max_length": 1024})
    if model.lora.r > 16:
        levers.append({"model.lora.r": 16})
    return levers


def with_values(recipe: AnyRecipe, values: Mapping[str, Any]) -> AnyRecipe:
    """Return a recipe in which some keys (``block.key``) have other values."""
    for name, value in values.items():
        recipe = _replaced(recipe, name.split("."), value)
    return recipe


def _replaced(block: Any, place: Sequence[str], value: Any) -> Any:  # noqa: ANN401 -- frozen pydantic blocks
    key, *rest = place
    return block.model_copy(update={key: _replaced(getattr(block, key), rest, value) if rest else value})


@click.command(cls=Command)
@click.argument("recipe_file", metavar="RECIPE", type=click.Path(path_type=Path))
@click.argument("models", nargs=-1, required=True, metavar="MODEL...", type=click.Path(path_type=Path))
def main(recipe_file: Path, models: Sequence[Path]) -> None:
    """Print the estimated peak of RECIPE with every MODEL (a YAML file) on every card, in GiB: Unsloth / transformers +
    PEFT, ! if too much."""
    from malpyeong.config.load import read_recipe
    from malpyeong.config.recipe import GRPORecipe, SFTRecipe

    click.echo("| model | " + " | ".join(f"{gpu} ({gib:g} GiB)" for gpu, gib in USABLE_GIB.items()) + " |")
    click.echo("|-|" + "-|" * len(USABLE_GIB))
    for path in models:
        cells = [path.stem]
        for gpu, gib in USABLE_GIB.items():
            recipe = read_recipe(recipe_file, [str(path), f"gpu={gpu}"])
            if not isinstance(recipe, SFTRecipe | GRPORecipe) or recipe.model.name not in SHAPES:
                raise InputError(f"{path}: its memory on a card is not known; use malpyeong.doctor")
            estimates = [estimate_recipe(recipe, SHAPES[recipe.model.name], backend) for backend in BACKENDS]
            mark = "" if all(one.fits(gib) for one in estimates) else " !"
            cells.append(" / ".join(f"{one.peak / GIB:.1f}" for one in estimates) + mark)
        click.echo(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
