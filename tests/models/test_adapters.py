"""What adapters, bases and merged models there may be, and what becomes of them: real loading, training and merging."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoConfig, GenerationConfig

from malpyeong.config.load import load_recipe
from malpyeong.config.recipe import LoraBlock, SFTRecipe
from malpyeong.contest.records import load_records
from malpyeong.errors import InputError
from malpyeong.export import export
from malpyeong.export import main as export_command
from malpyeong.models.adapter import check_adapter, put_adapter
from malpyeong.models.load import load_base, load_for_prediction, load_for_training, tokenizer_for_prediction
from malpyeong.models.tokenizer import load_tokenizer, save_tokenizer
from malpyeong.predict import main as predict_command
from malpyeong.prompts.messages import build_messages, prompt_ids
from malpyeong.samples import DATA, TINY_BASE
from malpyeong.training.callbacks import TrainingStoppedError, check_learnt
from malpyeong.training.preflight import SAMPLES
from malpyeong.training.run import weights_digest

ROOT = Path(__file__).parents[2]
QUESTIONS = load_records(DATA / "test_questions.json")[:2]


def block(**lora):
    recipe = load_recipe(ROOT / "recipes" / "tiny" / "sft.yaml", [f"model.name={TINY_BASE}"], SFTRecipe)
    return recipe.model.model_copy(update={"lora": LoraBlock(r=4, alpha=8, **lora)})


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter with weights that do something, and the tokenizer beside it."""
    folder = tmp_path_factory.mktemp("runs") / "adapter"
    model, tokenizer = load_for_training(block(), seed=0, gradient_checkpointing=False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def merged(adapter, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "merged"
    export(adapter, folder, dtype="float32", check=QUESTIONS, max_new_tokens=16)
    return folder


def one_line(result):
    """Return the one line that a command ended in, with exit code 2."""
    assert result.exit_code == 2, (result.output, result.exception)
    return result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["q_proj", "kv_proj"], r"no layer kv_proj; nearest: .*v_proj"),
        (["q_proj", "dense"], r"no layer dense; nearest: "),
        (["mlp"], "no layer mlp"),
        (["q_proj", "lm_head"], "lm_head: .* would not be trained; leave it out"),
        (["embed_tokens"], "embed_tokens shares its weights .* leave it out"),
    ],
)
def test_every_target_module_must_be_one_that_is_trained(names, message):
    with pytest.raises(InputError, match=message):
        load_for_training(block(target_modules=names), seed=0, gradient_checkpointing=False)


def test_target_modules_of_one_layer_may_be_named_in_full():
    names = ["layers.0.self_attn.q_proj", "down_proj"]
    model, _ = load_for_training(block(target_modules=names), seed=0, gradient_checkpointing=False)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * (1 + 4)


def test_an_adapter_of_which_a_part_finds_no_place_is_refused(adapter, tmp_path):
    """As of a model with more layers: PEFT passes over what it has no place for."""
    shutil.copytree(adapter, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    more = {name.replace("layers.3.", "layers.4."): tensor.clone() for name, tensor in weights.items() if ".3." in name}
    save_file({**weights, **more}, file)
    with pytest.raises(InputError, match=r"does not fit the base model .*layers\.4\."):
        put_adapter(load_base(str(TINY_BASE), torch.float32), tmp_path / "adapter")


def test_an_adapter_whose_weights_have_other_names_is_refused(adapter, tmp_path):
    """As of the same layers inside another architecture: as many weights, of which PEFT loads none."""
    shutil.copytree(adapter, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = {name.replace(".layers.", ".language_model.layers."): one for name, one in load_file(file).items()}
    save_file(weights, file)
    with pytest.raises(InputError, match=r"does not fit the base model .*layers\.0\."):
        put_adapter(load_base(str(TINY_BASE), torch.float32), tmp_path / "adapter")


def test_an_adapter_is_no_model(adapter, tmp_path):
    """transformers would load it with its base; a new adapter would then be put in its place."""
    shutil.copytree(adapter, tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text("utf-8")), "base_model_name_or_path": str(TINY_BASE)}))
    named = block().model_copy(update={"name": str(tmp_path / "adapter")})
    with pytest.raises(InputError, match=re.escape(str(TINY_BASE))):
        load_for_training(named, seed=0, gradient_checkpointing=False)
    command = [str(tmp_path / "adapter"), str(DATA / "test_questions.json"), "-o", str(tmp_path / "out.json")]
    assert str(TINY_BASE) in one_line(CliRunner().invoke(predict_command, command))


def test_a_base_of_4_bit_weights_is_dequantised_and_merged(adapter, tmp_path):
    base = tmp_path / "bnb-4bit"
    load_base(str(TINY_BASE), torch.float32, load_in_4bit=True).save_pretrained(base)
    load_tokenizer(str(TINY_BASE)).save_pretrained(base)
    command = [str(adapter), "-o", str(tmp_path / "merged"), "--base", str(base), "--dtype", "float32"]
    assert "--dequantised" in one_line(CliRunner().invoke(export_command, command))
    result = CliRunner().invoke(export_command, [*command, "--dequantised", "--check-records", "1"])
    assert result.exit_code == 0, (result.output, result.exception)
    config = json.loads((tmp_path / "merged" / "config.json").read_text("utf-8"))
    assert "quantization_config" not in config
    # Not the base in 4 bits again: what it was trained on, and the adapter.
    export(adapter, tmp_path / "same", str(TINY_BASE), "float32", dequantised=True, check=QUESTIONS, max_new_tokens=16)
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "same"))
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in expected)


@pytest.mark.parametrize("values", [{"do_sample": False, "temperature": 1e-06}, {"do_sample": False, "top_p": 0.8}])
def test_a_generation_config_that_cannot_be_saved_is_no_end_of_an_export(values, adapter, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(TINY_BASE, base)
    (base / "generation_config.json").write_text(json.dumps({**values, "eos_token_id": 2, "repetition_penalty": 1.05}))
    parity = export(adapter, tmp_path / "merged", str(base), "float32", check=QUESTIONS, max_new_tokens=16)
    assert parity.ok
    generation = GenerationConfig.from_pretrained(tmp_path / "merged")
    generation.validate(strict=True)
    assert (generation.eos_token_id, generation.repetition_penalty, generation.temperature) == (2, None, None)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="limits the size of files as POSIX systems can")
def test_a_disk_that_does_not_hold_the_merged_model_is_one_line(adapter, tmp_path):
    command = [sys.executable, "-m", "malpyeong.export", adapter, "-o", tmp_path / "merged", "--check-records", "1"]
    limited = f"ulimit -f 512; {shlex.join(map(str, command))}"
    result = subprocess.run(["bash", "-c", limited], cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert result.returncode == 2, result.stderr[-2000:]
    assert f"{tmp_path / 'merged'}: cannot be written" in result.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_programs_of_transformers_4_can_load_what_is_written(adapter, merged, tmp_path):
    reference = load_tokenizer(str(TINY_BASE))
    for folder in (adapter, merged):
        config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
        assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert "extra_special_tokens" not in config
        alone, loaded = Tokenizer.from_file(str(folder / "tokenizer.json")), load_tokenizer(str(folder))
        for text in SAMPLES:
            ids = reference(text, add_special_tokens=False)["input_ids"]
            assert alone.encode(text, add_special_tokens=False).ids == ids
            assert loaded(text, add_special_tokens=False)["input_ids"] == ids
        prompt = build_messages(QUESTIONS[0])
        assert prompt_ids(loaded, prompt) == prompt_ids(reference, prompt)
    reference.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    save_tokenizer(reference, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text("utf-8"))
    assert config["additional_special_tokens"] == ["<|im_start|>"]
    assert load_tokenizer(str(tmp_path)).extra_special_tokens == ["<|im_start|>"]


def test_a_merged_models_rotary_base_has_its_old_name_too(adapter, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(TINY_BASE, base)
    config = json.loads((base / "config.json").read_text("utf-8"))
    config["rope_parameters"] = {"rope_theta": 500_000.0, "rope_type": "linear", "factor": 2.0}
    (base / "config.json").write_text(json.dumps(config), "utf-8")
    export(adapter, tmp_path / "merged", str(base), "float32", check=QUESTIONS, max_new_tokens=16)
    written = json.loads((tmp_path / "merged" / "config.json").read_text("utf-8"))
    assert written["rope_theta"] == 500_000.0
    assert written["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert AutoConfig.from_pretrained(tmp_path / "merged").rope_parameters == config["rope_parameters"]


def test_a_merged_model_is_not_given_its_adapter_again(adapter, merged, tmp_path):
    questions = tmp_path / "questions.json"
    shutil.copy(DATA / "test_questions.json", questions)
    shutil.copytree(adapter, tmp_path / "copy")  # known by its content, wherever it is
    command = [str(merged), str(questions), "-o", str(tmp_path / "pred.json"), "--adapter", str(tmp_path / "copy")]
    assert "merged into it already" in one_line(CliRunner().invoke(predict_command, command))
    command = [str(adapter), "-o", str(tmp_path / "out"), "--base", str(merged)]
    assert "merged into it already" in one_line(CliRunner().invoke(export_command, command))
    model = block().model_copy(update={"name": str(merged), "adapter": str(adapter)})
    with pytest.raises(InputError, match="merged into it already"):
        load_for_training(model, seed=0, gradient_checkpointing=False)
    # Another adapter of the same base, as SFT's on what GRPO's was merged into; and one of the merged model itself.
    file = tmp_path / "copy" / "adapter_model.safetensors"
    save_file({name: tensor * 2 for name, tensor in load_file(file).items()}, file)
    with pytest.raises(InputError, match="was trained without that one"):
        load_for_prediction(str(merged), str(tmp_path / "copy"))
    config = tmp_path / "copy" / "adapter_config.json"
    values = {**json.loads(config.read_text("utf-8")), "base_model_name_or_path": str(merged)}
    config.write_text(json.dumps(values), "utf-8")
    load_for_prediction(str(merged), str(tmp_path / "copy"))


def test_an_adapter_in_the_old_format_says_how_to_renew_it(adapter, tmp_path):
    folder = tmp_path / "옛 어댑터"
    shutil.copytree(adapter, folder)
    weights = load_file(folder / "adapter_model.safetensors")
    torch.save(weights, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"adapter_model\.bin") as error:
        check_adapter(folder)
    command = shlex.split(error.value.message.partition("with: ")[2])
    assert command[0] == "python"
    subprocess.run([sys.executable, *command[1:]], check=True)
    check_adapter(folder)
    renewed = load_file(folder / "adapter_model.safetensors")
    assert all(torch.equal(renewed[name], tensor) for name, tensor in weights.items())


@pytest.mark.slow
def test_an_adapter_by_its_hub_id(adapter, tmp_path):
    """From the cache of an earlier download, there being no hub here; and one that is nowhere."""
    shutil.copytree(adapter, tmp_path / "models--someone--malpyeong-sft" / "snapshots" / "0123abcd")
    refs = tmp_path / "models--someone--malpyeong-sft" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0123abcd")
    code = (
        "import sys; from malpyeong.models.adapter import base_of_adapter; "
        "from malpyeong.models.load import load_for_prediction; "
        "print(base_of_adapter(sys.argv[2])); merged, _ = load_for_prediction(*sys.argv[1:3]); "
        "base, _ = load_for_prediction(sys.argv[1]); weights = dict(base.named_parameters()); "
        "print(sum(not weight.equal(weights[name]) for name, weight in merged.named_parameters()))"
    )
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}

    def load(name):
        command = [sys.executable, "-c", code, str(TINY_BASE), name]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", env=environment)

    result = load("someone/malpyeong-sft")
    assert result.stdout.splitlines() == [str(TINY_BASE), "28"], result.stderr
    command = [
        sys.executable,
        "-m",
        "malpyeong.predict",
        TINY_BASE,
        DATA / "test_questions.json",
        "-o",
        tmp_path / "out",
    ]
    for name in ("someone/nothing", "runs/none"):
        result = subprocess.run(
            [*map(str, command), "--adapter", name], cwd=ROOT, capture_output=True, text=True, env=environment
        )
        assert result.returncode == 2, result.stderr
        assert f"{name}: there is no such folder" in result.stderr.splitlines()[-1]
        assert "Traceback" not in result.stderr


def test_nothing_learnt_is_one_line_that_says_why():
    weights = {"a": torch.ones(3)}
    before = weights_digest(weights)
    check_learnt({"a": torch.zeros(3)}, before, [])
    for log, reason in (
        ([{"learning_rate": 0.0, "grad_norm": 1.0}], "training.warmup_steps=0"),
        ([{"learning_rate": 1e-4, "grad_norm": 0.0}], "every gradient was 0"),
        ([{"learning_rate": 1e-4, "grad_norm": float("nan")}], "look at the loss"),
    ):
        with pytest.raises(TrainingStoppedError, match=re.escape(reason)):
            check_learnt(weights, before, log)
    later = [{"step": 1, "learning_rate": 0.0, "grad_norm": 1.0}, {"step": 2, "learning_rate": 1e-4, "grad_norm": 1.0}]
    with pytest.raises(TrainingStoppedError, match=r"by step 1, the best on dev: .* training\.warmup_steps=0"):
        check_learnt(weights, before, later, 1)
    with pytest.raises(TrainingStoppedError, match="not numbers"):
        check_learnt({"a": torch.tensor([1.0, float("nan"), 0.0])}, before, [])


def test_tokenizers_of_adapters_by_either_class(adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "adapter")
    file = tmp_path / "adapter" / "tokenizer_config.json"
    file.write_text(file.read_text("utf-8").replace("PreTrainedTokenizerFast", "TokenizersBackend"), "utf-8")
    texts = list(SAMPLES)
    old, new = (tokenizer_for_prediction(str(TINY_BASE), str(one)) for one in (tmp_path / "adapter", adapter))
    assert old(texts)["input_ids"] == new(texts)["input_ids"]
