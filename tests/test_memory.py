"""The memory estimate against the peak that TRL's trainers really reach, and what it says of the shipped recipes."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from malpyeong.memory import ModelShape, estimate
from malpyeong.model import load_tokenizer
from malpyeong.records import load_records
from malpyeong.samples import DATA, TINY_BASE
from malpyeong.training import grpo_dataset, keep_adapter_in_float32, sft_dataset

TOLERANCE = 0.25  # of the measured peak
BATCH, STEPS, RANK, VOCABULARY = 4, 2, 16, 12_000
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gradient_checkpointing", [True, False])
@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_the_estimate_is_near_the_measured_peak(stage, gradient_checkpointing, dtype, tmp_path):
    from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

    tokenizer = load_tokenizer(str(TINY_BASE))
    records = load_records(DATA / "train.json", answers="gold")
    records = sorted(records, key=lambda record: -len(record.question + record.answer))[: BATCH * STEPS]
    model, shape = random_model(dtype)
    common = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": STEPS,
        "max_steps": 1,
        "optim": "adamw_torch",
        "gradient_checkpointing": gradient_checkpointing,
        "bf16": dtype == torch.bfloat16,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
    }
    size = {"batch_size": BATCH, "dtype_bytes": dtype.itemsize, "rank": RANK, "targets": TARGETS}
    if stage == "sft":
        dataset = sft_dataset(tokenizer, records, 512)
        trainer = SFTTrainer(
            model, SFTConfig(**common, max_length=512), train_dataset=dataset, processing_class=tokenizer
        )
        size["max_length"] = max(len(row["input_ids"]) for row in dataset)
    else:
        length = 96
        dataset = grpo_dataset(tokenizer, records, 512, length, BATCH * STEPS, 0)
        trainer = GRPOTrainer(
            model,
            reward_funcs=lambda completions, **_: [float(index % 2) for index in range(len(completions))],
            args=GRPOConfig(**common, num_generations=4, max_completion_length=length, beta=0.0, temperature=1.0),
            train_dataset=dataset,
            processing_class=tokenizer,
        )
        prompts = [tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True) for row in dataset]
        longest = max(len(prompt["input_ids"]) for prompt in prompts)
        size |= {"max_length": longest + length, "max_completion_length": length, "completions": BATCH * STEPS}
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
    print(
        f"{stage} {gradient_checkpointing} {dtype}: {live.peak / 2**20:.0f} MiB, estimate/measured {found.peak / live.peak:.2f}",
        {f: round(getattr(found, f) / 2**20) for f in found.__slots__},
    )
    assert found.peak == pytest.approx(live.peak, rel=TOLERANCE)
