"""The memory estimate against the peak that TRL's trainers really reach, and what it says of the shipped recipes."""

import json
import weakref
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from malpyeong.config.gpu import USABLE_GIB
from malpyeong.config.load import load_recipe
from malpyeong.config.recipe import GRPORecipe, SFTRecipe
from malpyeong.contest.records import load_records
from malpyeong.models.load import load_for_training
from malpyeong.models.memory import GIB, SHAPES, VLLM_SHARE, ModelShape, estimate, estimate_recipe, next_lever
from malpyeong.models.tokenizer import load_tokenizer
from malpyeong.prompts.messages import prompt_ids
from malpyeong.samples import DATA, TINY_BASE
from malpyeong.training.data import Questions, grpo_dataset, sft_dataset
from malpyeong.training.session import keep_adapter_in_float32

RECIPES = Path(__file__).parents[2] / "recipes"
TOLERANCE = 0.15  # of the measured peak
RANK, VOCABULARY = 16, 12_000
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, as an allocator would without fragmentation."""

    def __init__(self):
        super().__init__()
        self._known = set()
        self.now = self.peak = 0

    def count(self, tensor):
        if not isinstance(tensor, torch.Tensor) or tensor.untyped_storage()._cdata in self._known:
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key, size):
        self._known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            self.count(tensor)
        return result


def random_model(dtype, layers=6, hidden=256):
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        head_dim=64,
        tie_word_embeddings=True,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = Qwen3ForCausalLM(config).to(dtype)
    lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS, task_type="CAUSAL_LM")
    model.enable_input_require_grads()
    return get_peft_model(model, lora), ModelShape.of(config)


FLOAT, BF16 = torch.float32, torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "fullest", "gradient_checkpointing", "dtype", "batch", "steps"),
    [
        ("sft", "logits", True, FLOAT, 4, 2),
        ("sft", "activations", False, BF16, 4, 2),
        ("grpo", "logits", True, BF16, 4, 2),
        ("grpo", "activations", False, FLOAT, 4, 2),
        ("grpo", "rollout", True, FLOAT, 2, 12),
        ("grpo", "rollout", True, BF16, 2, 12),
    ],
)
def test_the_estimate_is_near_the_measured_peak(
    stage, fullest, gradient_checkpointing, dtype, batch, steps, tmp_path, capsys
):
    """Whole steps of TRL's trainers, sampling and optimizer included; in each another part is the largest."""
    from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

    tokenizer = load_tokenizer(str(TINY_BASE))
    records = load_records(DATA / "train.json", answers="gold")
    records = sorted(records, key=lambda record: -len(record.question + record.answer))[:8]
    model, shape = random_model(dtype)
    common = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": steps,
        "max_steps": 1,
        "optim": "adamw_torch",
        "gradient_checkpointing": gradient_checkpointing,
        "bf16": dtype == BF16,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
    }
    size = {"batch_size": batch, "dtype_bytes": dtype.itemsize, "rank": RANK, "targets": TARGETS}
    if stage == "sft":
        dataset = sft_dataset(tokenizer, Questions(records), 512)
        arguments = SFTConfig(**common, max_length=512)
        trainer = SFTTrainer(model, arguments, train_dataset=dataset, processing_class=tokenizer)
        size["max_length"] = max(len(row["input_ids"]) for row in dataset)
    else:
        length = 96
        dataset = grpo_dataset(tokenizer, Questions(records), 512, length, batch * steps, 0)
        trainer = GRPOTrainer(
            model,
            reward_funcs=lambda completions, **_: [float(index % 2) for index in range(len(completions))],
            args=GRPOConfig(**common, num_generations=4, max_completion_length=length, beta=0.0),
            train_dataset=dataset,
            processing_class=tokenizer,
        )
        longest = max(len(prompt_ids(tokenizer, row["prompt"])) for row in dataset)
        size |= {"max_length": longest + length, "max_completion_length": length, "completions": batch * steps}
    keep_adapter_in_float32(trainer.model)
    live = LiveBytes()
    for parameter in trainer.model.parameters():
        live.count(parameter)
    with live:
        trainer.train()
    found = estimate(
        shape,
        stage=stage,
        load_in_4bit=False,
        optim="adamw_torch",
        gradient_checkpointing=gradient_checkpointing,
        **size,
    )
    with capsys.disabled():
        print(f" {live.peak / 2**20:.0f} MiB, estimate / measured {found.peak / live.peak:.2f}")
    parts = ("rollout",) if found.rollout > found.update else ("activations", "logits")
    assert max(parts, key=lambda part: getattr(found, part)) == fullest
    assert found.peak == pytest.approx(live.peak, rel=TOLERANCE)


def test_weights_of_a_4bit_model_are_counted_as_they_are_held():
    """NF4 with double quantisation, as bitsandbytes and PEFT hold it for training: the bytes of its tensors."""
    overrides = ["model.load_in_4bit=true", "model.dtype=bfloat16"]
    block = load_recipe(RECIPES / "tiny" / "sft.yaml", overrides, SFTRecipe).model
    model, _ = load_for_training(block, seed=0, gradient_checkpointing=False)
    held = 0
    for parameter in model.parameters():
        if not parameter.requires_grad:
            state = getattr(parameter, "quant_state", None)
            held += parameter.nbytes + (state.absmax.nbytes + state.state2.absmax.nbytes if state else 0)
    shape = ModelShape.of(model.config)
    found = estimate(shape, stage="sft", max_length=1, batch_size=1, rank=block.lora.r)
    # The estimate holds one dequantised layer besides.
    layer = 2 * max(inputs * outputs for inputs, outputs in shape.linears().values())
    assert found.weights - layer == pytest.approx(held, rel=0.01)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trained == shape.lora_parameters(block.lora.r, block.lora.target_modules)


@pytest.mark.parametrize("name", SHAPES)
def test_known_shapes_have_the_published_sizes(name):
    billions = {"4B": 4.0, "8B": 8.2, "8b": 8.0, "Base": 11.5, "Mini": 2.3, "Light": 7.3, "1.5B": 1.6}
    expected = next(size for part, size in billions.items() if part in name)
    shape = SHAPES[name]
    assert (shape.block_parameters + shape.other_parameters) / 1e9 == pytest.approx(expected, rel=0.03)


def recipe(model, gpu, *overrides, stage="grpo"):
    kind = {"sft": SFTRecipe, "grpo": GRPORecipe}[stage]
    return load_recipe(
        RECIPES / f"{stage}.yaml", [str(RECIPES / "models" / f"{model}.yaml"), f"gpu={gpu}", *overrides], kind
    )


MODELS = sorted(path.stem for path in (RECIPES / "models").glob("*.yaml"))


@pytest.mark.parametrize("backend", ["unsloth", "hf"])
@pytest.mark.parametrize("stage", ["sft", "grpo"])
@pytest.mark.parametrize("gpu", USABLE_GIB)
@pytest.mark.parametrize("model", MODELS)
def test_every_recipe_fits_every_card_or_has_a_lever(model, gpu, stage, backend):
    chosen = recipe(model, gpu, stage=stage)
    shape, limit = SHAPES[chosen.model.name], USABLE_GIB[gpu]
    if estimate_recipe(chosen, shape, backend).fits(limit):
        return
    assert gpu == "t4" or (gpu, model) == ("24gb", "midm")
    assert model in ("ax", "kanana", "qwen-8b", "midm")  # 7B parameters and more
    overrides, then = next_lever(chosen, shape, backend, limit)
    changed = recipe(model, gpu, *overrides, stage=stage)  # what the lever says is a valid recipe
    assert estimate_recipe(changed, shape, backend) == then
    assert then.fits(limit)


def measured():
    """Yield the rows of trainings that were measured on a GPU."""
    for path in sorted((RECIPES.parent / "benchmarks" / "results").glob("*.jsonl")):
        for row in map(json.loads, path.read_text("utf-8").splitlines()):
            if "peak_allocated_gib" in row["figures"]:
                yield pytest.param(row, id=f"{path.stem}: {row['step']}")


@pytest.mark.parametrize("row", list(measured()))
def test_the_estimate_is_at_most_a_tenth_above_the_peak_that_a_gpu_measured(row):
    """And never below it: a recipe that is said to fit does."""
    stage = Path(row["command"][1]).stem
    overrides = [part for part in row["command"] if "=" in part]
    backend = next(part.partition("=")[2] for part in overrides if part.startswith("model.backend="))
    kind = {"sft": SFTRecipe, "grpo": GRPORecipe}[stage]
    chosen = load_recipe(RECIPES / f"{stage}.yaml", overrides, kind)
    found = estimate_recipe(chosen, SHAPES[row["model"]], backend, row.get("card_gib"))
    assert 1 <= found.peak / GIB / row["figures"]["peak_allocated_gib"] <= 1.1


def test_vllms_share_holds_the_weights_that_unsloth_trains_on():
    native = recipe("qwen", "24gb", "model.load_in_4bit=false")
    sampled = recipe("qwen", "24gb", "model.load_in_4bit=false", "training.use_vllm=true")
    shape, share = SHAPES[native.model.name], VLLM_SHARE * 23 * GIB
    for backend in ("unsloth", "hf"):
        found, with_vllm = (estimate_recipe(one, shape, backend, 23) for one in (native, sampled))
        assert with_vllm.rollout == 0 < found.rollout
        held = with_vllm.peak - with_vllm.adapter - with_vllm.update - with_vllm.scorers - with_vllm.workspace
        assert held == pytest.approx(share + (found.weights if backend == "hf" else 0))


def test_levers_come_in_order_and_free_memory():
    large = recipe("qwen-8b", "24gb", "training.batch_size=16", "training.gradient_accumulation_steps=1")
    shape = SHAPES[large.model.name]
    needed = estimate_recipe(large, shape, "hf")
    assert not needed.fits(20)
    overrides, then = next_lever(large, shape, "hf", 20)
    assert overrides[0].startswith("training.batch_size=")
    assert then.peak < needed.peak
    assert then.fits(20)
    overrides, then = next_lever(large, shape, "hf", 1)  # nothing suffices: the one that frees the most
    assert not then.fits(1)
    assert then.peak < needed.peak
