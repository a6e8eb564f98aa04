"""BERTScore and BLEURT on small random models: against bert-score itself, and against the papers' architecture."""

import itertools
import json
import math
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from benchmarks.random_scorers import make_bleurt, make_encoder, make_sentencepiece, sample_texts
from malpyeong.errors import InputError
from malpyeong.metrics.bertscore import BERTScore
from malpyeong.metrics.bleurt import BLEURT, truncated
from malpyeong.metrics.pairs import MissingModelError, batches

REASONS = [text.partition("가 옳다. ")[2] for text in sample_texts()[::300] if "가 옳다. " in text]
PAIRS = [
    *itertools.pairwise(REASONS),
    (REASONS[0], REASONS[0]),
    ("짧다.", " ".join(REASONS) * 3),  # longer than 512 tokens
    (" ".join(REASONS) * 3, "짧다."),
    ("ㄹ과 ‘ㅡ’ 그리고 漢字 [ɛ] 한글", "ᄒᆞᆫ글"),
    ("", REASONS[0]),
    (REASONS[0], ""),
    ("  ", " "),
]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return make_encoder(tmp_path_factory.mktemp("채점 모형") / "t5 bert", hidden=64, vocabulary=2_000, words=1_500)


@pytest.fixture(scope="module")
def bleurt_folder(tmp_path_factory):
    shape = {"hidden": 48, "layers": 3, "heads": 3, "embedding": 16, "vocabulary": 2_000, "pieces": 1_500}
    return make_bleurt(tmp_path_factory.mktemp("채점 모형") / "bleurt", **shape)


@pytest.fixture(scope="module")
def bertscore(encoder):
    return BERTScore(str(encoder))


@pytest.fixture(scope="module")
def bleurt(bleurt_folder):
    return BLEURT(str(bleurt_folder))


def split(pairs):
    return [list(column) for column in zip(*pairs, strict=True)]


def test_bertscore_is_what_bert_score_gives_pair_by_pair(encoder, bertscore, tmp_path):
    from bert_score.scorer import BERTScorer

    copy = shutil.copytree(encoder, tmp_path / "bert")  # bert-score takes a path with "t5" in it for a T5
    theirs = BERTScorer(str(copy), num_layers=9, device="cpu")
    found = bertscore.score(*split(PAIRS))  # this also mends bert-score for transformers 5
    expected = [float(theirs.score([candidate], [reference])[2]) for candidate, reference in PAIRS[:-1]]
    expected.append(0.0)  # bert-score fails where nothing is left of both
    assert found == pytest.approx(expected, abs=1e-5)
    assert expected[-3:] == [0.0] * 3
    assert bertscore.score([REASONS[0]], [REASONS[0]]) == [pytest.approx(1, abs=1e-5)]


@pytest.mark.parametrize("name", ["bertscore", "bleurt"])
def test_a_score_does_not_depend_on_the_batch(name, request, encoder, bleurt_folder):
    kind, folder = {"bertscore": (BERTScore, encoder), "bleurt": (BLEURT, bleurt_folder)}[name]
    together = request.getfixturevalue(name).score(*split(PAIRS))
    alone = kind(str(folder))
    assert [alone.score([a], [b])[0] for a, b in PAIRS] == pytest.approx(together, abs=2e-5)
    assert max(together) - min(together) > 0.01


def rows_read(scorer):
    """Count the texts (or pairs) that the network reads."""
    read = []
    scorer._model.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(len(args[0] if args else kwargs["input_ids"])), with_kwargs=True
    )
    return read


def test_references_are_embedded_once_and_like_candidates_scored_once(encoder):
    scorer = BERTScore(str(encoder))
    read = rows_read(scorer)
    golds = REASONS[:2]
    first = scorer.score([REASONS[2]] * 7 + [REASONS[3]] + [REASONS[4]] * 8, [golds[0]] * 8 + [golds[1]] * 8)
    assert sum(read) == 2 + 3
    scorer.score([REASONS[5]] * 8, [golds[1]] * 8)
    assert sum(read) == 2 + 3 + 1
    assert scorer.score([REASONS[2]], [golds[0]]) == first[:1]
    assert sum(read) == 2 + 3 + 1


def test_like_pairs_are_read_by_bleurt_once(bleurt_folder):
    scorer = BLEURT(str(bleurt_folder))
    read = rows_read(scorer)
    scorer.score([REASONS[0]] * 8, [REASONS[1]] * 8)
    scorer.score([REASONS[0], REASONS[2]], [REASONS[1]] * 2)
    assert sum(read) == 2


def reference_bleurt(folder, reference, candidate, gelu):
    """BLEURT as its papers describe it, written out: embeddings of their own size projected to the model's, post-norm
    Transformer layers (Vaswani et al. 2017, BERT's order), tanh-pooled first token, one linear output."""
    from sentencepiece import SentencePieceProcessor

    weights = load_file(folder / "model.safetensors")
    settings = json.loads((folder / "config.json").read_text("utf-8"))
    pieces = SentencePieceProcessor(model_file=str(folder / "spm.model"))

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x, name):
        deviation = x - x.mean(-1, keepdim=True)
        scaled = deviation / torch.sqrt((deviation**2).mean(-1, keepdim=True) + settings["layer_norm_eps"])
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def activation(x):
        if gelu == "erf":
            return x * (1 + torch.erf(x / math.sqrt(2))) / 2
        return x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2

    first, second = ([pieces.PieceToId(piece) for piece in pieces.EncodeAsPieces(t)] for t in (reference, candidate))
    while len(first) + len(second) > 512 - 3:
        (first if len(first) > len(second) else second).pop()
    cls, sep = pieces.PieceToId("[CLS]"), pieces.PieceToId("[SEP]")
    ids = [cls, *first, sep, *second, sep]
    types = [0] * (len(first) + 2) + [1] * (len(second) + 1)
    e = "bleurt.embeddings."
    x = weights[f"{e}word_embeddings.weight"][ids] + weights[f"{e}token_type_embeddings.weight"][types]
    x = norm(x + weights[f"{e}position_embeddings.weight"][: len(ids)], f"{e}LayerNorm")
    x = linear(x, "bleurt.encoder.embedding_projection")
    heads = settings["num_attention_heads"]
    size = settings["hidden_size"] // heads
    for layer in range(settings["num_hidden_layers"]):
        at = f"bleurt.encoder.layer.{layer}."
        query, key, value = (
            linear(x, f"{at}attention.self.{name}").view(-1, heads, size).transpose(0, 1)
            for name in ("query", "key", "value")
        )
        attention = torch.softmax(query @ key.transpose(1, 2) / math.sqrt(size), dim=-1) @ value
        attended = linear(attention.transpose(0, 1).flatten(1), f"{at}attention.output.dense")
        x = norm(x + attended, f"{at}attention.output.LayerNorm")
        inner = linear(activation(linear(x, f"{at}intermediate.dense")), f"{at}output.dense")
        x = norm(x + inner, f"{at}output.LayerNorm")
    return float(linear(torch.tanh(linear(x[0], "bleurt.pooler.dense")), "classifier")[0])


@pytest.mark.parametrize("gelu", ["tanh", "erf"])
def test_bleurt_is_the_papers_architecture(gelu, bleurt_folder):
    expected = [reference_bleurt(bleurt_folder, reference, candidate, gelu) for candidate, reference in PAIRS]
    assert BLEURT(str(bleurt_folder), gelu=gelu).score(*split(PAIRS)) == pytest.approx(expected, abs=1e-5)


def test_bleurt_is_not_symmetric(bleurt):
    assert abs(bleurt.score([REASONS[0]], [REASONS[1]])[0] - bleurt.score([REASONS[1]], [REASONS[0]])[0]) > 1e-4


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 40))
def test_truncation_is_googles(reference, candidate, limit):
    a, b = reference, candidate
    while a + b > limit:
        a, b = (a - 1, b) if a > b else (a, b - 1)
    assert truncated(reference, candidate, limit) == (a, b)


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 120))
def test_batches_hold_every_index_once_and_fit(lengths, limit):
    found = list(batches(lengths, limit))
    assert sorted(index for batch in found for index in batch) == list(range(len(lengths)))
    assert all(len(batch) * max(lengths[i] for i in batch) <= limit for batch in found if len(batch) > 1)


def test_a_bin_file_is_read(bleurt_folder, tmp_path):
    folder = shutil.copytree(bleurt_folder, tmp_path / "copy")
    scores = BLEURT(str(folder)).score(*split(PAIRS))
    assert max(scores) - min(scores) > 1e-3
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert BLEURT(str(folder)).score(*split(PAIRS)) == pytest.approx(scores, abs=1e-6)


def change(folder, tmp_path, edit):
    copy = shutil.copytree(folder, tmp_path / "copy", dirs_exist_ok=True)
    weights = load_file(copy / "model.safetensors")
    edit(weights)
    save_file(weights, copy / "model.safetensors")
    return str(copy)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda w: w.pop("classifier.bias"), "missing keys: classifier.bias"),
        (lambda w: w.pop("bleurt.encoder.layer.1.output.dense.weight"), "layer.1.output.dense.weight"),
        (lambda w: w.update({"bleurt.encoder.layer.3.x.weight": torch.ones(2)}), "unexpected keys: .*layer.3"),
        (lambda w: w.update({"classifier.weight": torch.ones(1, 7)}), "classifier.weight"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_refused(edit, message, bleurt_folder, tmp_path):
    with pytest.raises(InputError, match=message):
        BLEURT(change(bleurt_folder, tmp_path, edit))


def test_damaged_or_absent_models_are_one_line(encoder, bleurt_folder, tmp_path):
    for kind in (BERTScore, BLEURT):
        with pytest.raises(MissingModelError, match="hf download nobody/nothing"):
            kind("nobody/nothing")
        (tmp_path / kind.__name__).mkdir()
        with pytest.raises(MissingModelError, match="download the model again"):
            kind(str(tmp_path / kind.__name__))
    for kind, folder in ((BERTScore, encoder), (BLEURT, bleurt_folder)):
        copy = shutil.copytree(folder, tmp_path / f"cut {kind.__name__}")
        whole = (copy / "model.safetensors").read_bytes()
        (copy / "model.safetensors").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(InputError, match="cut"):
            kind(str(copy))
    few = make_encoder(tmp_path / "few", hidden=32, layers=6, vocabulary=600, words=500)
    with pytest.raises(InputError, match="has 6 layers"):
        BERTScore(str(few))
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="no GPU"):
            BERTScore(str(encoder), device="cuda")


def test_a_tokenizer_without_korean_is_refused(encoder, tmp_path):
    copy = shutil.copytree(encoder, tmp_path / "vocab only")
    tokenizer = json.loads((copy / "tokenizer.json").read_text("utf-8"))
    tokenizer["model"]["vocab"] = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "a": 5}
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(InputError, match="Korean as unknown"):
        BERTScore(str(copy))


def test_the_published_pairs_command(bleurt_folder, run_module):
    result = run_module("-m", "malpyeong.metrics.bleurt", bleurt_folder)
    assert result.returncode == 1, result.stderr  # random weights do not give the published scores
    assert "published: 0.99905, 0.79302" in result.stdout
    assert result.stdout.count("gelu") == 2


def test_bertscore_refuses_missing_weights(encoder, tmp_path):
    copy = change(encoder, tmp_path, lambda w: w.pop("encoder.layer.3.output.dense.weight"))
    with pytest.raises(InputError, match=r"lacks weights .*layer\.3"):
        BERTScore(copy)


def test_bertscore_refuses_a_tokenizer_that_lower_cases(encoder, tmp_path):
    copy = shutil.copytree(encoder, tmp_path / "copy")
    (copy / "tokenizer_config.json").unlink()  # transformers then takes BERT's, which lower-cases
    with pytest.raises(InputError, match=r"lower-cases|Korean as unknown"):
        BERTScore(str(copy))


@pytest.mark.parametrize("name", ["spm.model", "config.json"])
def test_a_damaged_bleurt_file_is_one_line(name, bleurt_folder, tmp_path):
    copy = shutil.copytree(bleurt_folder, tmp_path / "copy")
    (copy / name).write_text("version https://git-lfs.github.com/spec/v1\n", encoding="utf-8")
    with pytest.raises(InputError, match="copy"):
        BLEURT(str(copy))


def test_vocabulary_and_weights_must_belong_together(bleurt_folder, tmp_path):
    copy = shutil.copytree(bleurt_folder, tmp_path / "copy")
    (copy / "spm.model").write_bytes(make_sentencepiece(2_100, 1_500))
    with pytest.raises(InputError, match="different checkpoints"):
        BLEURT(str(copy))


def test_half_precision_is_near_and_an_overflow_raises(encoder, bleurt_folder, tmp_path):
    for kind, folder in ((BERTScore, encoder), (BLEURT, bleurt_folder)):
        exact = kind(str(folder), device="cpu").score(*split(PAIRS[:4]))
        rough = kind(str(folder), device="cpu", dtype="bfloat16").score(*split(PAIRS[:4]))
        assert rough == pytest.approx(exact, abs=0.05)
        assert rough != exact
        broken = change(
            folder, tmp_path / kind.__name__, lambda w: [t.mul_(1e30) for t in w.values() if t.is_floating_point()]
        )
        with pytest.raises(FloatingPointError, match="float32"):
            kind(broken).score(*split(PAIRS[:2]))
