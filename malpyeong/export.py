"""Bring a LoRA adapter into a form that others use: ``python -m malpyeong.export ADAPTER -o FOLDER``.

Merged into its base model (16-bit shards, and GGUF with an Ollama Modelfile), or the adapter alone with all that it
needs. It is merged onto 16- or 32-bit weights, never onto 4-bit ones: there the small change is lost when the sum is
quantised again. What was written is loaded back and must give the logits and the greedy answers of the adapter model;
else nothing is left. ``export.json`` has the digests of all files and of the answers, for ``--verify``.
"""

import gc
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from malpyeong.contest.records import Record
from malpyeong.errors import InputError, counted
from malpyeong.files import digest, new_folder, write_text
from malpyeong.samples import DATA
from malpyeong.tasks.task import load
from malpyeong.terminal import Command

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from malpyeong.prompts.messages import Prompt

Format = Literal["merged", "adapter"]

# What counts as the same model. In float32 only the order of sums differs. A merge in 16 bits rounds every weight
# once more, so that near ties may fall the other way: there the likeliest next token must agree at nearly every place
# of the adapter model's answers. 8-bit GGUF is coarser.
MAX_LOGIT_DIFF = 1e-4
MIN_AGREEMENT = 0.98
MIN_AGREEMENT_8_BIT = 0.95
SHARD_SIZE = "4GB"


@dataclass(frozen=True, slots=True)
class Parity:
    """How the merged model compares with the adapter model.

    Attributes:
        max_logit_diff: largest absolute difference over all places of the checked prompts and answers.
        top_token_agreement: share of the answers' places at which the likeliest next token is the same.
        same_answers: whether every greedy answer is the same.
        records: how many prompts were checked.
        dtype: dtype of the merged weights.
    """

    max_logit_diff: float
    top_token_agreement: float
    same_answers: bool
    records: int
    dtype: str

    @property
    def ok(self) -> bool:
        """Whether what was written may be used in the adapter model's place."""
        if self.dtype == "float32":
            return self.same_answers and self.max_logit_diff <= MAX_LOGIT_DIFF
        return self.top_token_agreement >= (MIN_AGREEMENT_8_BIT if self.dtype == "q8_0" else MIN_AGREEMENT)

    def __str__(self) -> str:
        return (
            f"over {counted(self.records, 'prompt')} the largest logit difference is {self.max_logit_diff:.2g}, "
            f"the likeliest token is the same at {self.top_token_agreement:.1%} of places, "
            f"same answers: {self.same_answers}"
        )


def export(
    adapter: Path,
    output: Path,
    base: str | None = None,
    dtype: str | None = None,
    dequantised: bool = False,
    *,
    check: Sequence[Record],
    max_new_tokens: int = 320,
    form: Format = "merged",
    shard_size: str = SHARD_SIZE,
    gguf: tuple[Path, str] | None = None,
) -> Parity:
    """Write a folder of what an adapter has made of its base, whole or not at all.

    Args:
        adapter: folder of the LoRA adapter.
        output: folder to write; must not exist.
        base: the base model, if it is not where the adapter says.
        dtype: dtype of the merged weights; the base's own if None.
        dequantised: merge onto the base as 4-bit training saw it (NF4 and back), not onto its original weights.
        check: records, at least one, whose prompts are compared before and after.
        max_new_tokens: length limit of the compared answers.
        form: the merged model, or the adapter alone.
        shard_size: of a file of weights, at most.
        gguf: llama.cpp's converter and the type to write beside the merged weights.

    Raises:
        InputError: the adapter or its base cannot be loaded, or ``output`` exists or cannot be written.
        click.ClickException: what was written differs from the adapter model; nothing is left.
    """
    import torch
    from safetensors import SafetensorError

    from malpyeong.models.adapter import adapter_folder, base_of_adapter, put_adapter
    from malpyeong.models.card import card
    from malpyeong.models.gguf import convert, load_gguf, modelfile
    from malpyeong.models.load import load_base, set_generation_config, stop_tokens, tokenizer_for_prediction
    from malpyeong.models.tokenizer import save_tokenizer
    from malpyeong.prompts.messages import render
    from malpyeong.training.preflight import SAMPLES

    adapter = adapter_folder(adapter)
    base = base or base_of_adapter(adapter)
    with new_folder(output) as folder:
        tokenizer = tokenizer_for_prediction(base, str(adapter))
        chosen = getattr(torch, dtype) if dtype else _weights_dtype(base)
        model: Any = load_base(base, chosen, load_in_4bit=dequantised)
        if dequantised:
            model = _dequantised(model, base, chosen)
        elif form == "merged" and (method := getattr(model, "quantization_method", None)):
            raise InputError(
                f"{base}: is a quantised model, onto which an adapter must not be merged; name its 16-bit original "
                f"with --base{', or use --dequantised' if method == 'bitsandbytes' else ''}"
            )
        set_generation_config(model, tokenizer)
        model = put_adapter(model, adapter).to("cuda" if torch.cuda.is_available() else "cpu").eval()
        prompts = [render(tokenizer, record) for record in check]
        reference = _Reference.of(model, tokenizer, prompts, max_new_tokens)
        try:
            if form == "adapter":
                config = model.peft_config["default"]
                config.base_model_name_or_path, config.inference_mode = base, True
                model.save_pretrained(folder)
            else:
                model = model.merge_and_unload(safe_merge=True)
                model.save_pretrained(folder, max_shard_size=shard_size)
                _name_old_config_keys(folder / "config.json")
        except (OSError, SafetensorError) as error:
            size = sum(weight.numel() for weight in model.parameters()) * chosen.itemsize / 2**30
            raise InputError(f"{output}: cannot be written ({error}); the model takes {size:.1f} GiB there") from None
        texts = [*SAMPLES, *(record.question for record in check), *reference.answers.values()]
        save_tokenizer(tokenizer, folder, texts)
        del model
        gc.collect()
        name = str(chosen).removeprefix("torch.")
        reloaded, tokenizer = _load(folder, form, base, name)
        answers, parity = reference.compare(reloaded, tokenizer, name)
        _stop_unless_same(parity, output)
        made_of = {
            "format": form,
            "base": base,
            "adapter_sha256": digest(adapter / "adapter_model.safetensors"),
            **asdict(parity),
            "max_new_tokens": max_new_tokens,
            "questions_sha256": _of_texts(record.question for record in check),
            "answers_sha256": {record.id: _of_texts([answers[row]]) for row, record in enumerate(check)},
        }
        if gguf is not None:
            del reloaded
            weights = convert(gguf[0].resolve(), folder, gguf[1])
            of_gguf = reference.compare(load_gguf(weights), tokenizer, {"f32": "float32"}.get(gguf[1], gguf[1]))[1]
            _stop_unless_same(of_gguf, output)
            made_of["gguf"] = asdict(of_gguf)
            stops = [str(tokenizer.convert_ids_to_tokens(token)) for token in stop_tokens(str(folder), tokenizer)]
            write_text(folder / "Modelfile", modelfile(weights.name, tokenizer, stops))
        write_text(folder / "README.md", card(base, adapter, made_of))
        made_of["files"] = {
            path.relative_to(folder).as_posix(): digest(path) for path in sorted(folder.rglob("*")) if path.is_file()
        }
        write_text(folder / "export.json", json.dumps(made_of, ensure_ascii=False, indent=2) + "\n")
    return parity


def verify(folder: Path, base: str | None = None, *, check: Sequence[Record]) -> int:
    """Make sure that an exported folder is as it was written: every file, and the answers of the reloaded model.

    Args:
        folder: the folder.
        base: of an adapter alone, if it is not where ``export.json`` says.
        check: at least the records that were compared when it was written, in their order.

    Returns:
        The number of answers that were compared.

    Raises:
        InputError: a file is missing or another than was written, or ``check`` has other questions.
        click.ClickException: an answer is another than was recorded.
    """
    from malpyeong.prompts.messages import render

    path = folder / "export.json"
    try:
        made_of = json.loads(path.read_text("utf-8"))
        files, answers = made_of["files"], made_of["answers_sha256"]
    except (OSError, ValueError, TypeError, KeyError):
        raise InputError(f"{path}: is missing, damaged or of an earlier version; export the adapter again") from None
    for name, recorded in files.items():
        if not (folder / name).is_file():
            raise InputError(f"{folder / name}: is missing; copy or download the folder again")
        if digest(folder / name) != recorded:
            raise InputError(f"{folder / name}: is not what was exported; copy or download the folder again")
    check = check[: made_of["records"]]
    if made_of["questions_sha256"] != _of_texts(record.question for record in check):
        raise InputError(f"{folder}: was compared on other questions; name their file with --check")
    model, tokenizer = _load(folder, made_of["format"], base or made_of["base"], made_of["dtype"])
    prompts = [render(tokenizer, record) for record in check]
    now = _answers(model, tokenizer, prompts, made_of["max_new_tokens"])
    different = [record.id for row, record in enumerate(check) if _of_texts([now[row]]) != answers[record.id]]
    if different:
        ties = "" if made_of["dtype"] == "float32" else "; in 16 bits near ties may fall another way on other hardware"
        raise click.ClickException(
            f"{folder}: {len(different)} of {len(check)} answers are not as recorded, the first to question "
            f'"{different[0]}"{ties}'
        )
    return len(check)


def _load(folder: Path, form: Format, base: str, dtype: str) -> tuple[Any, "PreTrainedTokenizerBase"]:
    """Load what was written; an adapter alone is not merged."""
    import torch

    from malpyeong.models.adapter import put_adapter
    from malpyeong.models.load import load_base, load_for_prediction, set_generation_config
    from malpyeong.models.tokenizer import load_tokenizer

    if form == "merged":
        return load_for_prediction(str(folder), dtype=dtype)
    model, tokenizer = load_base(base, getattr(torch, dtype)), load_tokenizer(str(folder))
    set_generation_config(model, tokenizer)
    return put_adapter(model, folder).to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


def _answers(
    model: Any,  # noqa: ANN401 -- a transformers or PEFT model
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence["Prompt"],
    max_new_tokens: int,
) -> dict[int, str]:
    from malpyeong.decoding.answers import predict
    from malpyeong.decoding.engines import Decoding, TransformersEngine

    return dict(predict(TransformersEngine(model, tokenizer, Decoding(max_new_tokens=max_new_tokens)), prompts))


@dataclass(frozen=True, slots=True)
class _Reference:
    """What the adapter model in memory answers, and its logits over prompts and answers."""

    prompts: Sequence["Prompt"]
    answers: Mapping[int, str]
    texts: list[list[int]]
    logits: list[Any]
    max_new_tokens: int

    @classmethod
    def of(
        cls,
        model: Any,  # noqa: ANN401 -- a PeftModel
        tokenizer: "PreTrainedTokenizerBase",
        prompts: Sequence["Prompt"],
        max_new_tokens: int,
    ) -> "_Reference":
        from malpyeong.prompts.messages import completion_ids

        answers = _answers(model, tokenizer, prompts, max_new_tokens)
        texts = [prompt.ids + completion_ids(tokenizer, answers[row]) for row, prompt in enumerate(prompts)]
        return cls(prompts, answers, texts, _logits(model, texts), max_new_tokens)

    def compare(
        self,
        model: Any,  # noqa: ANN401 -- a transformers or PEFT model
        tokenizer: "PreTrainedTokenizerBase",
        dtype: str,
    ) -> tuple[dict[int, str], Parity]:
        """Return a reloaded model's answers, and how it compares."""
        import torch

        from malpyeong.models.load import set_generation_config
        from malpyeong.prompts.messages import render

        set_generation_config(model, tokenizer)
        pairs = list(zip(self.logits, _logits(model, self.texts), strict=True))
        agreement = torch.cat(
            [
                (a.argmax(-1) == b.argmax(-1))[len(prompt.ids) - 1 :]
                for (a, b), prompt in zip(pairs, self.prompts, strict=True)
            ]
        )
        again = [render(tokenizer, prompt.record) for prompt in self.prompts]
        answers = _answers(model, tokenizer, again, self.max_new_tokens)
        return answers, Parity(
            max_logit_diff=max(float((a - b).abs().max()) for a, b in pairs),
            top_token_agreement=float(agreement.float().mean()),
            same_answers=answers == self.answers,
            records=len(self.prompts),
            dtype=dtype,
        )


def _stop_unless_same(parity: Parity, output: Path) -> None:
    if not parity.ok:
        raise click.ClickException(
            f"{output}: not written; what was written ({parity.dtype}) differs from the adapter model: {parity}"
        )


def _of_texts(texts: Iterable[str]) -> str:
    return hashlib.sha256(json.dumps(list(texts), ensure_ascii=False).encode()).hexdigest()


def _dequantised(model: Any, base: str, dtype: Any) -> Any:  # noqa: ANN401 -- a transformers model, a torch dtype
    """Return a quantised model with ordinary weights, of the values that its quantised ones stand for."""
    quantizer = model.hf_quantizer
    try:
        model = model.dequantize(dtype=dtype)
    except NotImplementedError:
        raise InputError(f"{base}: cannot be dequantised; name its 16-bit original with --base") from None
    # How a folder of 4-bit weights was read cannot be reversed, and need not be: what is saved is not in 4 bits.
    of_quantizer = {type(step) for one in quantizer.get_weight_conversions() for step in one.operations}
    model._weight_conversions = [
        one
        for one in model._weight_conversions
        if of_quantizer.isdisjoint(type(step) for step in getattr(one, "operations", ()))
    ]
    return model


def _name_old_config_keys(path: Path) -> None:
    """Write the rotary embedding's base under its name of transformers 4 too, which would take 10,000 instead."""
    config = json.loads(path.read_text("utf-8"))
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            config["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
        write_text(path, json.dumps(config, ensure_ascii=False, indent=2) + "\n")


def _logits(model: Any, texts: Sequence[list[int]]) -> list[Any]:  # noqa: ANN401 -- a transformers or PEFT model
    """Return the logits over each text, of shape (tokens, vocabulary), in float32."""
    import torch

    with torch.inference_mode():
        return [model(input_ids=torch.tensor([ids], device=model.device)).logits[0].float().cpu() for ids in texts]


def _weights_dtype(base: str) -> Any:  # noqa: ANN401 -- torch.dtype
    """Return the dtype of a base model's weights."""
    import torch
    from transformers import AutoConfig

    try:
        dtype = AutoConfig.from_pretrained(base).dtype
    except (OSError, ValueError):
        raise InputError(
            f"{base}: the adapter's base model is not here; name its folder or hub id with --base"
        ) from None
    return dtype or torch.float32


@click.command(cls=Command)
@click.argument("source", metavar="ADAPTER", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--base", help="Base model, if it is not where the adapter says.")
@click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="[default: the base's]")
@click.option("--dequantised", is_flag=True, help="Merge onto the base as 4-bit training saw it.")
@click.option("--adapter-only", is_flag=True, help="Do not merge: the adapter with tokenizer and card.")
@click.option("--shard-size", default=SHARD_SIZE, show_default=True, help="Largest file of weights.")
@click.option("--gguf", is_flag=True, help="Beside the merged weights a GGUF file and an Ollama Modelfile.")
@click.option(
    "--gguf-type",
    type=click.Choice(["f32", "f16", "bf16", "q8_0"]),
    default="f16",
    show_default=True,
    help="Of --gguf.",
)
@click.option("--llama-cpp", type=click.Path(path_type=Path), help="Folder of llama.cpp [default: $LLAMA_CPP]")
@click.option("--push-to-hub", metavar="ID", help="Upload the folder to the Hugging Face hub (a new one is private).")
@click.option("--verify", "only_verify", is_flag=True, help="ADAPTER is an exported folder: is it as it was written?")
@click.option(
    "--check",
    type=click.Path(path_type=Path),
    default=DATA / "test_questions.json",
    help="Questions to compare on.",
)
@click.option("--check-records", default=8, show_default=True, type=click.IntRange(min=1))
def main(
    source: Path,
    output: Path | None,
    base: str | None,
    dtype: str | None,
    dequantised: bool,
    adapter_only: bool,
    shard_size: str,
    gguf: bool,
    gguf_type: str,
    llama_cpp: Path | None,
    push_to_hub: str | None,
    only_verify: bool,
    check: Path,
    check_records: int,
) -> None:
    """Merge ADAPTER into its base model and write the model folder, checked; or another format of it."""
    from malpyeong.models.card import push
    from malpyeong.models.gguf import find_converter
    from malpyeong.models.memory import out_of_memory

    records = load(check)
    cure = "merge on the CPU (CUDA_VISIBLE_DEVICES= before the command), or predict without: --adapter, --load-in-4bit"
    if only_verify:
        with out_of_memory(cure):
            click.echo(f"{source}: every file and {counted(verify(source, base, check=records), 'answer')} as recorded")
        return
    if output is None:
        raise InputError("-o: name the folder to write")
    if adapter_only and (gguf or dequantised):
        raise InputError("--adapter-only: is not merged, so leave out --gguf and --dequantised")
    converter = (find_converter(llama_cpp), gguf_type) if gguf else None
    with out_of_memory(cure):
        parity = export(
            source,
            output,
            base,
            dtype,
            dequantised,
            check=records[:check_records],
            form="adapter" if adapter_only else "merged",
            shard_size=shard_size,
            gguf=converter,
        )
    click.echo(f"{output}: {'adapter' if adapter_only else 'merged'} in {parity.dtype}; {parity}")
    if push_to_hub:
        click.echo(f"{output}: on the hub, {push(output, push_to_hub)}")


if __name__ == "__main__":
    main()
