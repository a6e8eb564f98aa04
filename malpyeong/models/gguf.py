"""GGUF through llama.cpp's converter, and an Ollama Modelfile with the model's chat template and stop tokens."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from malpyeong.contest.answer import INSTRUCTION
from malpyeong.errors import InputError
from malpyeong.prompts.messages import TEMPLATE_OPTIONS, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONVERTER = "convert_hf_to_gguf.py"
CONTENT = "{{ .Content }}"
GET_IT = (
    "git clone --depth 1 https://github.com/ggml-org/llama.cpp, then --llama-cpp llama.cpp, or LLAMA_CPP=llama.cpp in "
    "the environment"
)


def find_converter(folder: str | Path | None) -> Path:
    """Return llama.cpp's converter in ``folder``, or else in ``$LLAMA_CPP``.

    Raises:
        InputError: it is not there, or the package that it and the comparison need is not installed.
    """
    from importlib.util import find_spec

    place = folder or os.environ.get("LLAMA_CPP")
    if not place:
        raise InputError(f"--gguf: needs {CONVERTER} of llama.cpp; {GET_IT}")
    if not (Path(place) / CONVERTER).is_file():
        raise InputError(f"{place}: has no {CONVERTER}; {GET_IT}")
    if find_spec("gguf") is None:
        raise InputError("--gguf: the package gguf is not installed; pip install gguf")
    return Path(place) / CONVERTER


def convert(converter: Path, model: Path, kind: str) -> Path:
    """Write ``model-KIND.gguf`` into a folder of 16- or 32-bit weights, and return its path.

    Args:
        converter: see :func:`find_converter`.
        model: the model's folder.
        kind: ``f32``, ``f16``, ``bf16`` or ``q8_0``.

    Raises:
        InputError: the converter fails, as for an architecture or a pre-tokenizer that it does not know.
    """
    output = model / f"model-{kind}.gguf"
    command = [sys.executable, str(converter), str(model), "--outfile", str(output), "--outtype", kind]
    result = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace")
    if result.returncode or not output.is_file():
        lines = result.stderr.strip().splitlines() or ["it wrote no file"]
        raise InputError(f"{converter}: could not convert the model ({lines[-1][:300]}); try a newer llama.cpp")
    return output


def load_gguf(path: Path) -> Any:  # noqa: ANN401 -- a transformers model
    """Load the weights of a GGUF file, dequantised to float32, with the configuration beside it, in eval mode.

    Raises:
        InputError: transformers cannot read it.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder, config = str(path.parent), AutoConfig.from_pretrained(path.parent)  # of GGUF's keys transformers knows some
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=path.name, config=config, dtype=torch.float32
        )
    except Exception as error:  # whatever it meets in a file that another program wrote
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(
            f"{path.name}: transformers cannot read it back to compare it ({reason[0][:200]}); leave --gguf out and "
            f"convert the merged folder with {CONVERTER} unchecked"
        ) from None
    return model.eval()


@dataclass(frozen=True, slots=True)
class Turns:
    """What a chat template puts around each role's text, and what opens the answer."""

    before_system: str
    after_system: str
    before_user: str
    after_user: str
    before_assistant: str
    after_assistant: str
    opening: str

    def _around(self, role: str, text: str) -> str:
        return f"{getattr(self, f'before_{role}')}{text}{getattr(self, f'after_{role}')}"

    def render(self, messages: Sequence[Message]) -> str:
        """Return the prompt of messages."""
        return "".join(self._around(one["role"], one["content"]) for one in messages) + self.opening

    def go_template(self) -> str:
        """Return the template in Go's language, as Ollama reads it."""
        turns = [f'if eq .Role "{role}" }}}}{self._around(role, CONTENT)}' for role in _ROLES]
        return "{{ range .Messages }}{{ " + "{{ else ".join(turns) + "{{ end }}{{ end }}" + self.opening


_ROLES = ("system", "user", "assistant")
_SAMPLES: tuple[tuple[str, ...], ...] = (("가나", "다라"), ("가 나\n'다'", "라? {마/바}"), ("S", "U", "A", "V"))


def _render(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], opening: bool = True) -> str:
    text = str(
        tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=opening, **TEMPLATE_OPTIONS)
    )
    # A program that reads GGUF puts the bos token there itself.
    return text.removeprefix(str(tokenizer.bos_token)) if tokenizer.bos_token else text


def _conversation(texts: Sequence[str]) -> list[Message]:
    roles = ("system", "user", "assistant", "user")
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


def read_turns(tokenizer: "PreTrainedTokenizerBase") -> tuple[Turns | None, list[str]]:
    """Read off a tokenizer's chat template, from samples that it renders, what it puts around each role's text.

    Returns:
        (the turns, what they do not render as the template does), the turns None where the prompt of system and user,
        which the model was trained with, cannot be made in this way.
    """
    system, user, answer, again = "\ue000S", "\ue000U", "\ue000A", "\ue000V"
    whole = _render(tokenizer, _conversation([system, user, answer, again]))
    asked = _render(tokenizer, _conversation([system, user]))
    closed = _render(tokenizer, _conversation([system, user]), opening=False)
    alone = _render(tokenizer, _conversation([system, user])[1:])
    try:
        before_system, rest = asked.split(system)
        between, end = rest.split(user)
        after_user = closed.split(user)[1]
        before_assistant, after_answer = whole.split(user)[1].split(again)[0].split(answer)
    except ValueError:
        return None, ["system and user"]
    before_user = os.path.commonprefix([between[::-1], after_answer[::-1], alone.split(user)[0][::-1]])[::-1]
    turns = Turns(
        before_system=before_system,
        after_system=between.removesuffix(before_user),
        before_user=before_user,
        after_user=after_user,
        before_assistant=before_assistant.removeprefix(after_user),
        after_assistant=after_answer.removesuffix(before_user),
        opening=end.removeprefix(after_user),
    )
    unlike: dict[str, list[bool]] = {"system and user": [], "several turns": [], "no system": []}
    for texts in _SAMPLES:
        name, messages = ("several turns" if len(texts) > 2 else "system and user"), _conversation(texts)
        unlike[name].append(turns.render(messages) != _render(tokenizer, messages))
        unlike["no system"].append(turns.render(messages[1:2]) != _render(tokenizer, messages[1:2]))
    differs = [name for name, samples in unlike.items() if any(samples)]
    literal = any("{{" in part or '"""' in part for part in astuple(turns))
    return (None if literal or "system and user" in differs else turns), differs


def modelfile(weights: str, tokenizer: "PreTrainedTokenizerBase", stops: Sequence[str]) -> str:
    """Return an Ollama Modelfile: weights, template, the instruction as system prompt, greedy decoding, stop tokens.

    What of the chat template Go's language does not say here stands in comments.
    """
    turns, differs = read_turns(tokenizer)
    lines = [f"FROM ./{weights}"]
    if differs:
        lines.append(f"# Not as the model's own chat template: {', '.join(differs)}.")
    if turns is None:
        lines.append("# So there is no TEMPLATE: Ollama takes what the GGUF file says. Compare its prompts.")
    else:
        lines.append(f'TEMPLATE """{turns.go_template()}"""')
    lines += [f'SYSTEM """{INSTRUCTION}"""', "PARAMETER temperature 0", "PARAMETER repeat_penalty 1"]
    if tokenizer.model_max_length < 1_000_000:
        lines.append(f"PARAMETER num_ctx {tokenizer.model_max_length}")
    lines += [f"PARAMETER stop {json.dumps(token, ensure_ascii=False)}" for token in stops]
    return "\n".join(lines) + "\n"
