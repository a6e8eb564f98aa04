"""Scorer models with random weights, in the layout of the real ones: for tests and benchmarks.

Time and memory do not depend on the values of weights. Vocabularies are learnt from the sample data and filled up to
the real size with pieces that never occur.
"""

import io
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from sentencepiece import SentencePieceTrainer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
    RemBertConfig,
    RemBertForSequenceClassification,
)

from malpyeong.contest.records import load_records
from malpyeong.samples import DATA

_SPREAD = 0.06  # of the weights: wide enough for scores to differ from text to text
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def sample_texts() -> list[str]:
    """Return the answers of the sample data's train split."""
    return [record.answer or "" for record in load_records(DATA / "train.json", answers="gold")]


def make_encoder(
    folder: Path, hidden: int = 768, layers: int = 12, vocabulary: int = 119_547, seed: int = 0, words: int = 6_000
) -> Path:
    """Write a multilingual-BERT-like encoder for BERTScore; the defaults are mBERT's shape."""
    torch.manual_seed(seed)
    make_wordpiece(vocabulary, words).save_pretrained(folder)
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 64),
        intermediate_size=4 * hidden,
        initializer_range=_SPREAD,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def make_bleurt(
    folder: Path,
    hidden: int = 1152,
    layers: int = 32,
    heads: int = 18,
    embedding: int = 256,
    vocabulary: int = 250_300,
    seed: int = 0,
    pieces: int = 6_000,
) -> Path:
    """Write a BLEURT checkpoint in the converted layout (``bleurt.…`` keys); the defaults are BLEURT-20's shape."""
    torch.manual_seed(seed)
    settings = {
        "architectures": ["BleurtForSequenceClassification"],
        "model_type": "bleurt",
        "vocab_size": vocabulary,
        "embedding_size": embedding,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
        "hidden_act": "gelu",
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
    }
    config = RemBertConfig(
        input_embedding_size=embedding,
        num_labels=1,
        **{key: settings[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")},
        intermediate_size=settings["intermediate_size"],
        initializer_range=_SPREAD,
    )
    model = RemBertForSequenceClassification(config)
    weights = {
        key.replace("embedding_hidden_mapping_in.", "embedding_projection.").replace("rembert.", "bleurt."): value
        for key, value in model.state_dict().items()
    }
    weights["bleurt.embeddings.position_ids"] = torch.arange(512).unsqueeze(0)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    save_file({key: value.contiguous() for key, value in weights.items()}, folder / "model.safetensors")
    (folder / "spm.model").write_bytes(make_sentencepiece(vocabulary, pieces))
    return folder


def make_wordpiece(vocabulary: int, words: int) -> PreTrainedTokenizerFast:
    """Return a cased WordPiece tokenizer with ``vocabulary`` entries, ``words`` of them learnt."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(
        sample_texts(),
        trainers.WordPieceTrainer(
            vocab_size=words, limit_alphabet=words // 3, special_tokens=SPECIAL, show_progress=False
        ),
    )
    known = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    entries = {piece: index for index, piece in enumerate([*known, *_fillers(vocabulary - len(known))])}
    tokenizer.model = models.WordPiece(entries, unk_token="[UNK]")
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", entries["[SEP]"]), ("[CLS]", entries["[CLS]"]))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        unk_token="[UNK]",
        mask_token="[MASK]",
    )


def make_sentencepiece(vocabulary: int, pieces: int) -> bytes:
    """Return a SentencePiece unigram model with ``vocabulary`` pieces, ``pieces`` of them learnt."""
    written = io.BytesIO()
    SentencePieceTrainer.Train(
        sentence_iterator=iter(sample_texts()),
        model_writer=written,
        vocab_size=pieces,
        hard_vocab_limit=False,
        model_type="unigram",
        normalization_rule_name="identity",
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        control_symbols=["[CLS]", "[SEP]"],
        minloglevel=2,
    )
    # The file is a protobuf, in which another entry of a list may simply follow: field 1, a piece, holds its text
    # (field 1) and its score (field 2, a float).
    model = written.getvalue()
    learnt = _count_pieces(model)
    for filler in _fillers(vocabulary - learnt):
        text = filler.encode()
        piece = b"\x0a" + bytes([len(text)]) + text + b"\x15\x00\x00\xc8\xc2"  # -100.0
        model += b"\x0a" + bytes([len(piece)]) + piece
    return model


def _count_pieces(model: bytes) -> int:
    from sentencepiece import SentencePieceProcessor

    return int(SentencePieceProcessor(model_proto=model).GetPieceSize())


def _fillers(count: int) -> Iterable[str]:
    return (f"~{number:x}~" for number in range(count))
