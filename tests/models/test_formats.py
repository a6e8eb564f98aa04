"""Formats of an exported model: each is written, loaded back and compared, and verified later on. Real loading."""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from malpyeong.config.load import load_recipe
from malpyeong.config.recipe import SFTRecipe
from malpyeong.contest.answer import INSTRUCTION
from malpyeong.contest.records import load_records
from malpyeong.export import export, main
from malpyeong.models.card import licence
from malpyeong.models.gguf import modelfile, read_turns
from malpyeong.models.load import load_for_training
from malpyeong.models.tokenizer import load_tokenizer, save_tokenizer
from malpyeong.prompts.messages import TEMPLATE_OPTIONS
from malpyeong.samples import DATA, TINY_BASE

ROOT = Path(__file__).parents[2]
QUESTIONS = load_records(DATA / "test_questions.json")[:2]
SHORT = {"dtype": "float32", "check": QUESTIONS, "max_new_tokens": 16}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter with weights that do something, in a run's folder."""
    run = tmp_path_factory.mktemp("runs") / "grpo"
    recipe = load_recipe(ROOT / "recipes" / "tiny" / "sft.yaml", [f"model.name={TINY_BASE}"], SFTRecipe)
    model, tokenizer = load_for_training(recipe.model, seed=0, gradient_checkpointing=False)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(run / "adapter")
    save_tokenizer(tokenizer, run / "adapter")
    (run / "config.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")), encoding="utf-8")
    (run / "environment.json").write_text(json.dumps({"sha256": {"data.train": "abc"}, "versions": {}, "git": "1a2b"}))
    return run / "adapter"


@pytest.fixture(scope="module")
def merged(adapter, tmp_path_factory):
    folder = tmp_path_factory.mktemp("merged") / "m"
    assert export(adapter, folder, **SHORT, shard_size="3MB").same_answers
    return folder


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def one_line(result, code):
    assert result.exit_code == code, (result.output, result.exception)
    assert "Traceback" not in result.stderr
    return result.stderr.splitlines()[-1]  # below the bars of loading


def test_merged_shards_load_elsewhere_and_answer_greedily(merged):
    assert len(list(merged.glob("model-*.safetensors"))) > 1
    assert (merged / "model.safetensors.index.json").exists()
    generation = GenerationConfig.from_pretrained(merged)
    assert (generation.do_sample, generation.eos_token_id, generation.temperature) == (False, 2, None)
    assert AutoTokenizer.from_pretrained(merged).chat_template
    files = json.loads((merged / "export.json").read_text("utf-8"))["files"]
    assert {*files, "export.json"} == {path.name for path in merged.iterdir()}


def test_what_was_exported_is_verified_later_on(merged, tmp_path):
    folder = tmp_path / "사본"

    def fresh():
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(merged, folder)
        return sorted(folder.glob("model-*.safetensors"))[0]

    fresh()
    assert run("--verify", folder).exit_code == 0
    shard = fresh()
    damaged = bytearray(shard.read_bytes())
    damaged[-5] ^= 1
    shard.write_bytes(damaged)
    assert shard.name in one_line(run("--verify", folder), 2)
    fresh().unlink()
    assert shard.name in one_line(run("--verify", folder), 2)
    fresh()
    shutil.copy(ROOT / "pyproject.toml", folder / "tokenizer.json")
    assert "tokenizer.json" in one_line(run("--verify", folder), 2)
    assert "--check" in one_line(run("--verify", merged, "--check", DATA / "unseen_questions.json"), 2)
    made_of = json.loads((merged / "export.json").read_text("utf-8"))
    made_of["answers_sha256"][QUESTIONS[1].id] = "0"
    (folder / "export.json").write_text(json.dumps(made_of))
    shutil.copy(merged / "tokenizer.json", folder / "tokenizer.json")
    assert f'"{QUESTIONS[1].id}"' in one_line(run("--verify", folder), 1)
    (folder / "export.json").unlink()
    assert "export.json" in one_line(run("--verify", folder), 2)


def test_an_adapter_alone_is_all_that_its_base_needs(adapter, tmp_path):
    folder = tmp_path / "alone"
    parity = export(adapter, folder, str(TINY_BASE), **SHORT, form="adapter")
    assert (parity.max_logit_diff, parity.same_answers) == (0.0, True)
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    assert (config["base_model_name_or_path"], config["inference_mode"]) == (str(TINY_BASE), True)
    assert {"tokenizer.json", "chat_template.jinja", "README.md"} <= {path.name for path in folder.iterdir()}
    assert AutoModelForCausalLM.from_pretrained(folder).peft_config  # as others load it
    assert run("--verify", folder).exit_code == 0
    assert "--gguf" in one_line(run(adapter, "-o", tmp_path / "o", "--adapter-only", "--gguf"), 2)


def test_a_card_has_what_the_model_was_made_from_and_no_paths(adapter, merged):
    card = (merged / "README.md").read_text("utf-8")
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "other"
    assert "base_model" not in front  # a folder of this machine
    assert "SHA-256 of data.train: abc" in card
    assert "learning_rate" in card
    assert str(TINY_BASE) not in card
    assert str(adapter.parent) not in card
    assert licence("Qwen/Qwen3-4B") == "Apache-2.0."
    assert licence("naver-hyperclovax/HyperCLOVAX-SEED-Text-Instruct-1.5B").startswith("HyperCLOVA X SEED Model Licen")


@pytest.mark.parametrize("named", [[], ["--llama-cpp", ROOT]])
def test_gguf_without_llama_cpp_says_how_to_get_it(named, adapter, tmp_path, monkeypatch):
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    line = one_line(run(adapter, "-o", tmp_path / "out", "--gguf", *named), 2)
    assert "convert_hf_to_gguf.py" in line
    assert "git clone" in line
    assert not (tmp_path / "out").exists()


def test_gguf_is_read_back_and_compared(adapter, tmp_path):
    pytest.importorskip("gguf")
    converter = tmp_path / "convert_hf_to_gguf.py"
    shutil.copy(Path(__file__).with_name("stand_in_converter.py"), converter)
    export(adapter, tmp_path / "out", **SHORT, gguf=(converter, "f16"))
    made_of = json.loads((tmp_path / "out" / "export.json").read_text("utf-8"))
    assert made_of["gguf"]["top_token_agreement"] >= 0.98
    assert {"model-f16.gguf", "Modelfile"} <= made_of["files"].keys()
    lines = (tmp_path / "out" / "Modelfile").read_text("utf-8").splitlines()
    assert lines[0] == "FROM ./model-f16.gguf"
    assert 'PARAMETER stop "<|im_end|>"' in lines


def rendered(text, messages):
    """Return what Ollama makes of a Modelfile's TEMPLATE, as far as ours go."""
    template = re.search(r'TEMPLATE """(.*?)"""', text, re.DOTALL)[1]
    body, opening = re.fullmatch(
        r"\{\{ range .Messages \}\}(.*)\{\{ end \}\}\{\{ end \}\}(.*)", template, re.DOTALL
    ).groups()
    roles = re.findall(r'\{\{ (?:else )?if eq .Role "(\w+)" \}\}(.*?)(?=\{\{ else if|\Z)', body, re.DOTALL)
    turns = dict(roles)
    return "".join(turns[one["role"]].replace("{{ .Content }}", one["content"]) for one in messages) + opening


LLAMA_3 = (
    "{{- bos_token }}{%- for m in messages %}{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + "
    "m['content'] | trim + '<|eot_id|>' }}{%- endfor %}{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
DEFAULT_SYSTEM = (
    "{%- if messages[0]['role'] != 'system' %}{{- '<s>도우미<e>' }}{%- endif %}{%- for m in messages %}"
    "{{- '<' + m['role'][0] + '>' + m['content'] + '<e>' }}{%- endfor %}{{- '<a>' }}"
)
JOINED = "{{- 'Q: ' + messages[-1]['content'] + '\n' + messages[0]['content'] + '\nA: ' }}"


@pytest.mark.parametrize(
    ("template", "differs"), [(None, []), (LLAMA_3, []), (DEFAULT_SYSTEM, ["no system"]), (JOINED, None)]
)
def test_a_modelfile_renders_as_the_chat_template_or_says_that_it_does_not(template, differs):
    tokenizer = load_tokenizer(str(TINY_BASE))
    tokenizer.chat_template = template or tokenizer.chat_template
    tokenizer.bos_token = "<|endoftext|>" if template == LLAMA_3 else None
    turns, found = read_turns(tokenizer)
    text = modelfile("model.gguf", tokenizer, ["<|im_end|>"])
    if differs is None:
        assert turns is None
        assert "TEMPLATE" not in re.sub(r"(?m)^#.*", "", text)
        return
    assert found == differs
    messages = [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": "{가/나}\n다?"}]
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **TEMPLATE_OPTIONS)
    assert rendered(text, messages) == expected.removeprefix(tokenizer.bos_token or "")


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload of small files needs."""

    files: dict[str, bytes] = {}  # noqa: RUF012 -- the server makes a handler for each request

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.endswith("/repos/create"):
            assert json.loads(body)["visibility"] == "private"
            answer = {"url": f"{self.server.address}/someone/model", "name": "someone/model"}
        elif self.path.endswith("/validate-yaml"):  # of the card's front matter
            answer = {"errors": [], "warnings": []}
        elif "/preupload/" in self.path:
            named = [file["path"] for file in json.loads(body)["files"]]
            answer = {"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in named]}
        else:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            answer = {
                "commitUrl": f"{self.server.address}/someone/model/commit/1",
                "commitOid": "1",
                "pullRequestUrl": None,
            }
        self._answer(answer)

    def do_GET(self):
        self._answer({"id": "someone/model", "sha": "1", "siblings": [], "private": True})

    def _answer(self, value):
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


def push(folder, **environment):
    code = (
        "import click; from pathlib import Path; from malpyeong.models.card import push\n"
        "@click.command()\n@click.argument('folder', type=Path)\n"
        "def main(folder): print(push(folder, 'someone/model'))\nmain()"
    )
    return subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )


def test_a_folder_is_pushed_to_the_hub(tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "README.md").write_text("# 모델\n", encoding="utf-8")
    server = HTTPServer(("127.0.0.1", 0), Hub)
    server.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    result = push(folder, HF_ENDPOINT=server.address, HF_HUB_OFFLINE="0", HF_TOKEN="hf_x", HF_HUB_DISABLE_XET="1")
    server.shutdown()
    assert result.returncode == 0, result.stderr[-3000:]
    assert Hub.files == {"README.md": "# 모델\n".encode()}
    result = push(folder, HF_HUB_OFFLINE="1")
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert f"hf upload someone/model {folder}" in line
