"""Korean particles: which form follows a word, and which one gold answers have behind a sentence."""

_CLOSING = "\"'”’)]}」』》〉"
_DIGITS_WITH_FINAL_CONSONANT = frozenset("013678")  # 영 일 삼 육 칠 팔
# Consonant form → vowel form; 으로 is 로 after ㄹ too.
VOWEL_FORMS = {
    "은": "는",
    "이": "가",
    "을": "를",
    "과": "와",
    "으로": "로",
    "이랑": "랑",
    "이나": "나",
    "아": "야",
    "이라고": "라고",
    "이라는": "라는",
    "이었다": "였다",
    "이라": "라",
}


def subject_particle(sentence: str) -> str:
    """Return the particle that belongs between a sentence and 옳다, as gold answers have it.

    이 only where the last letter is a syllable with a final consonant and a full stop or question mark follows it
    (closing quotes and brackets may come after that). All else takes 가 whatever it ends in: titles, dates, phrases.
    So does a sentence with ``이 옳다`` in it: behind 이 the contest would split there.

    Args:
        sentence: with or without the quotes around it; of two joined sentences the last one counts.
    """
    text = sentence.rstrip(_CLOSING)
    letters = text.rstrip(".?")
    spoken = letters != text and "가" <= letters[-1:] <= "힣" and has_final_consonant(letters)
    return "이" if spoken and "이 옳다" not in sentence else "가"


def has_final_consonant(word: str) -> bool:
    """Tell whether the last spoken letter of ``word`` ends in a consonant (ㄹ is read 리을, 7 is read 칠)."""
    for character in reversed(word):
        if "가" <= character <= "힣":
            return (ord(character) - ord("가")) % 28 != 0
        if "ㄱ" <= character <= "ㅎ":
            return True
        if "0" <= character <= "9":
            return character in _DIGITS_WITH_FINAL_CONSONANT
        if character.isalnum():
            return False
    return False


def attach(word: str, particle: str) -> str:
    """Return ``word`` with a particle, which is given in the form that follows a consonant (은, 이, 으로, …)."""
    takes_vowel_form = not has_final_consonant(word) or (particle == "으로" and _ends_in_rieul(word))
    return word + (VOWEL_FORMS.get(particle, particle) if takes_vowel_form else particle)


def _ends_in_rieul(word: str) -> bool:
    letters = [character for character in word if character.isalnum()]
    if not letters:
        return False
    last = letters[-1]
    if "가" <= last <= "힣":
        return (ord(last) - ord("가")) % 28 == 8
    return last in "ㄹ178"
