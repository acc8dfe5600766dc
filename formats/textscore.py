"""What a record's text says of itself: lengths, repetition, refusals, personal data, languages.

Pure functions, computed once while annotations are read and kept as columns of the catalog and of every index, so that
recipes can drop by them before any media is opened, and anybody can cut a finished build later. Each score prefers
silence to a false alarm: where it cannot tell, it is 0 or None.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import pycld2

from formats.sample import Turn

VERSION = f"1/cld2-{pycld2.VERSION}"
"""Raise the first number when a score changes; catalogs of other versions are read anew."""

_RUN = 5  # words
_FEWEST_RUNS = 20  # an answer of fewer repeats itself by chance
_MOSTLY = 0.6


@dataclass(frozen=True, slots=True)
class TextScores:
    """Scores of one record, by the names of their columns.

    Attributes:
        n_words: of all turns. What stands between spaces is a word, and so is each Chinese or Japanese character.
        shortest_answer, longest_turn: in words.
        repetition: share of runs of five words that have stood in the same answer before; of the worst answer.
        n_refusals: answers that begin by declining, or by "as an AI language model".
        n_emails, n_phones, n_cards: e-mail addresses, telephone numbers and payment card numbers in all turns.
        question_language, answer_language: ISO 639-1 codes of the human's and the assistant's text as CLD2 tells
            them; None if there is too little text, or no language in it for sure.
        language_mismatch: both are known and differ, and the question does not ask for another language.
    """

    n_words: int
    shortest_answer: int
    longest_turn: int
    repetition: float
    n_refusals: int
    n_emails: int
    n_phones: int
    n_cards: int
    question_language: str | None
    answer_language: str | None
    language_mismatch: bool


def text_scores(turns: Sequence[Turn]) -> TextScores:
    """Scores a conversation."""
    answers = [turn.text for turn in turns if turn.role == "gpt"]
    others = [turn.text for turn in turns if turn.role != "gpt"]
    everything = "\n".join((*others, *answers))
    answer_words = [words(text) for text in answers]
    answer_counts = [len(found) for found in answer_words]
    other_counts = [len(words(text)) for text in others]
    numbers = _numbers(everything)
    question, answer = _language(others), _language(answers)
    return TextScores(
        n_words=sum(answer_counts) + sum(other_counts),
        shortest_answer=min(answer_counts, default=0),
        longest_turn=max((*answer_counts, *other_counts), default=0),
        repetition=max([repetition(found) for found in answer_words if len(found) > _FEWEST_RUNS], default=0.0),
        n_refusals=sum([is_refusal(text) for text in answers if len(text) >= _SHORTEST_REFUSAL]),
        n_emails=emails(everything),
        n_phones=sum(map(is_phone, numbers)),
        n_cards=sum(map(is_card, numbers)),
        question_language=question,
        answer_language=answer,
        language_mismatch=question is not None and answer is not None and _differ(others, question, answer),
    )


# Words --------------------------------------------------------------------------------------------------------------

_LONE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # kana and Chinese characters
_WORD = re.compile(f"[{_LONE}]|[^\\s{_LONE}]+")


def words(text: str) -> list[str]:
    """The words of a text: what stands between spaces, and each Chinese or Japanese character."""
    return text.split() if text.isascii() else _WORD.findall(text)


def repetition(answer: Sequence[str]) -> float:
    """Share of an answer's five-word runs that are not new, 0 to 1, to four digits.

    0 for an answer that is short, or whose words are mostly distinct, which costs a tenth of counting runs.
    """
    runs = len(answer) - _RUN + 1
    if runs < _FEWEST_RUNS or len(set(answer)) > _MOSTLY * len(answer):
        return 0.0
    distinct = len(set(zip(*(answer[i:] for i in range(_RUN)), strict=False)))
    return round(1 - distinct / runs, 4)


# Refusals -----------------------------------------------------------------------------------------------------------

_OPENING = 200  # characters; a refusal that comes later is part of a story, or of an answer
_SHORTEST_REFUSAL = 16
_CANNOT = r"(?:can(?:no|')?t|can not|(?:am |'m )(?:un|not )able to|won't|will not)"
_HELP = (
    r"(?:assist|help|fulfil|comply|provide|answer|do that|create|generate|write|engage|continue|support|respond"
    r"|identify (?:people|individuals|who))"
)
_DECLINES = re.compile(
    rf"(?:i'm |i am )?(?:very |really |so )?sorry,? (?:but )?(?:i|as an ai)\b.{{0,20}}?\b{_CANNOT}\b"
    rf"|(?:i apologi[sz]e|my apologies|unfortunately),? (?:but )?i\b.{{0,8}}?\b{_CANNOT} {_HELP}"
    rf"|i ?{_CANNOT} {_HELP}"
    r"|(?:很?抱歉|对不起|對不起)[，,].{0,12}(?:无法|不能|無法)"
)
_IS_MODEL = re.compile(
    r"\bas an? (?:ai|artificial intelligence)(?: language)?(?: model| assistant| chatbot)\b"
    r"|\bas a (?:large )?language model\b"
    r"|作为(?:一个|一種|一种)?(?:ai|人工智能)(?:语言)?(?:模型|助手)"
)


def is_refusal(answer: str) -> bool:
    """Whether an answer begins by declining to give one, or by saying that a language model speaks."""
    opening = answer[:_OPENING].lower().replace("’", "'").lstrip()
    if _DECLINES.match(opening):
        return True
    return ("as a" in opening or "作为" in opening) and _IS_MODEL.search(opening) is not None


# Personal data ------------------------------------------------------------------------------------------------------

_EMAIL = re.compile(r"(?<![\w.+-])([\w+-][\w.+-]{0,63})@((?:[a-z0-9-]{1,63}\.)+[a-z]{2,24})(?![\w@])", re.I)
_NO_PERSON = re.compile(
    r"^(?:git|no-?reply|user(?:name)?|name|you|your\.?(?:name|email)|e?mail|foo|test|example)$", re.I
)
_NO_HOST = re.compile(
    r"(?:^|\.)(?:example\.\w+|test|invalid|local(?:host)?|png|jpe?g|gif|svg|webp)$|^(?:e?mail|domain)\."
)
_DIGITS = re.compile(r"[0-9][0-9 ().-]{8}")  # is in every number; found in a quarter of the time
_NUMBER = re.compile(r"(?<![\w.,/+-])\+?\(?\d[\d ().-]{8,24}\d(?![\w/]|[.,]\d)")
_PHONE = re.compile(
    r"\+[1-9]\d{0,2}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,5}(?:[ .-]?\d{2,5}){1,4}"
    r"|(?:\([2-9]\d\d\) ?|[2-9]\d\d-)[2-9]\d\d-\d{4}"
)
_CARD = re.compile(r"(?:\d{13,19}|\d{4}([ -])\d{4}\1\d{4}\1\d{4}|\d{4}([ -])\d{6}\2\d{5})")
_ISSUER = re.compile(r"4|5[1-5]|2[2-7]|3[47]|6(?:011|4|5)")


def emails(text: str) -> int:
    """E-mail addresses in a text that may be somebody's: not example.com's, not "icon@2x.png", not a git remote."""
    if "@" not in text:
        return 0
    return sum(not _NO_PERSON.match(name) and not _NO_HOST.search(host.lower()) for name, host in _EMAIL.findall(text))


def _numbers(text: str) -> list[str]:
    """What may be a telephone or card number."""
    return _NUMBER.findall(text) if _DIGITS.search(text) else []


def is_phone(number: str) -> bool:
    """Whether a number is written as one dials it: "+44 20 7946 0958", "(415) 555-2671", "415-555-2671"."""
    digits = sum(c.isdigit() for c in number)
    return 8 <= digits <= 15 and _PHONE.fullmatch(number) is not None


def is_card(number: str) -> bool:
    """Whether a number is written as on a payment card, has an issuer's first digits, and passes Luhn's check."""
    if not _CARD.fullmatch(number):
        return False
    digits = [int(c) for c in number if c.isdigit()]
    doubled = (sum(divmod(2 * digit, 10)) for digit in digits[-2::-2])
    return bool(_ISSUER.match(number)) and (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


# Languages ----------------------------------------------------------------------------------------------------------

_SAMPLE = 160  # characters; CLD2 needs 60 ns for each
_SHORTEST = {True: 40, False: 12}  # characters of ASCII, or of anything else
_SURE = 90  # percent of the text
_SENTENCE_END = re.compile(r"[.!?:;\n。！？：]+")
_MOST_SENTENCES = 20
_NOT_TEXT = re.compile("[^\t\n\r -~\xa0-\ud7ff\ue000-\ufdcf\ufdf0-\ufffd\U00010000-\U0001fffd]")  # CLD2 refuses it
_OTHER_ASKED = re.compile(
    r"translat|tradu|trad[uú]z|übersetz|перев[ео]|翻[译譯訳]|訳|번역|dịch|terjemah|\blanguage|sprache|idioma|langue"
    r"|english|ingl[eé]s|anglais|englisch|англ|영어|英[语語文]|french|français|german|deutsch|spanish|español|italian"
    r"|portugu|russian|русск|chinese|mandarin|中文|[汉漢]语|japanese|日本?[语語文]|korean|한국어|arabic|hindi|turkish"
    r"|vietnam|indones|dutch|polish|ukrain|latin|greek|hebrew|swedish|persian|farsi"
)


def _language(texts: Sequence[str]) -> str | None:
    """The language of the beginning of some texts."""
    text = next(iter(texts), "")[:_SAMPLE]
    for more in texts[1:]:
        if len(text) >= _SAMPLE:
            break
        text = f"{text}\n{more[: _SAMPLE - len(text)]}"
    if len(text) < _SHORTEST[text.isascii()]:
        return None
    reliable, found = _detected(text)
    code, percent = found[0]
    return code if reliable and percent >= _SURE else None


def _detected(text: str) -> tuple[bool, list[tuple[str | None, int]]]:
    """Whether CLD2 relies on its answer, and up to three languages with their percent of the text."""
    try:
        reliable, _, found = pycld2.detect(text, isPlainText=True)
    except pycld2.error:
        reliable, _, found = pycld2.detect(_NOT_TEXT.sub(" ", text), isPlainText=True)
    return reliable, [(None if code == "un" else code.partition("-")[0], percent) for _, code, percent, _ in found]


def _differ(questions: Sequence[str], question: str, answer: str) -> bool:
    """Whether the answers' language is nowhere in the questions, not in one sentence, nor asked for."""
    if question == answer:
        return False
    asked = "\n".join((*(text[:_SAMPLE] for text in questions), *(text[-_SAMPLE:] for text in questions)))
    if _OTHER_ASKED.search(asked.lower()):
        return False
    parts = (asked, *_SENTENCE_END.split(asked)[:_MOST_SENTENCES])
    return not any(code == answer for part in parts for code, _ in _detected(part)[1])
