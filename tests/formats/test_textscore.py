"""formats.textscore: what is junk is told, and what only looks like it is not."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from formats.sample import Role, Turn
from formats.textscore import TextScores, emails, is_refusal, repetition, text_scores, words


def scores(question: str, *answers: str) -> TextScores:
    roles: list[Role] = ["human", "gpt"]
    texts = [question, *(text for answer in answers for text in (answer, "And?"))][: 2 * len(answers)]
    return text_scores([Turn(roles[i % 2], text) for i, text in enumerate(texts)])


def test_words_are_counted_by_spaces_and_by_characters_where_there_are_none() -> None:
    assert words("Two  words\nand two") == ["Two", "words", "and", "two"]
    assert len(words("一条街上有 two 车。")) == 8
    assert words("Schöne Grüße") == ["Schöne", "Grüße"]


def test_lengths_are_of_the_whole_the_shortest_answer_and_the_longest_turn() -> None:
    found = scores("What is in the picture?", "A red bus.", "It stops at the corner of the street")
    assert (found.n_words, found.shortest_answer, found.longest_turn) == (5 + 3 + 1 + 8, 3, 8)


def test_an_answer_that_goes_round_in_circles_repeats_itself() -> None:
    loop = "the man is holding a cup and " * 30
    assert scores("What is he doing?", loop).repetition > 0.9
    half = " ".join(f"word{i} follows" for i in range(40)) + " and so on and on again" * 12
    assert 0.3 < scores("Go on.", half).repetition < 0.6


def test_prose_and_lists_do_not_repeat_themselves(shared: Path) -> None:
    file = shared / "data/annotations/evol_instruct/evol_instruct_gpt4_turbo_143k_readme_record.json"
    content = json.loads(file.read_text())
    (answer,) = [t["value"] for t in _conversation(content) if t["from"] == "gpt"]
    assert len(words(answer)) > 100
    assert repetition(words(answer)) < 0.1
    table = "\n".join(f"| row {i} | {i * i} | {i + 7} |" for i in range(40))
    assert repetition(words(table)) < 0.3
    assert repetition(words("yes " * 20)) == 0, "too short to tell"


def _conversation(content: object) -> list[dict[str, str]]:
    if isinstance(content, dict) and "conversations" in content:
        return list(content["conversations"])
    values = content.values() if isinstance(content, dict) else content if isinstance(content, list) else []
    return next((found for value in values if (found := _conversation(value))), [])


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry, but I can't assist with that request.",
        "I’m sorry, but I cannot see the image.",
        "Sorry I cannot help with that.",
        "As an AI language model, I don't have personal opinions.",
        "Unfortunately, as an AI assistant I have no access to the internet.",
        "I apologize, but I cannot fulfill this request.",
        "I'm unable to provide that information.",
        "很抱歉，我无法提供该信息。",
        "作为一个AI语言模型，我没有个人观点。",
    ],
)
def test_a_refusal_is_told(answer: str) -> None:
    assert is_refusal(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry to hear that you lost your keys. A locksmith can help.",
        "“I'm sorry, but I can't come,” said Anna, and closed the door.",
        "I cannot recommend this book enough!",
        "I am unable to see a dog in the picture; there is only a cat.",
        "As an AI engineer, you tune models. An AI model learns from data.",
        "As an assistant professor, she taught for ten years.",
        "The story begins in a small town. " * 8 + "As an AI language model, the robot had no home.",
        "No.",
    ],
)
def test_an_answer_that_only_sounds_like_a_refusal_is_none(answer: str) -> None:
    assert not is_refusal(answer)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("Write to anna.schmidt@uni-koeln.de, or to bob+x@gmail.com.", 2),
        ("The icon is icon@2x.png, the user is user@example.com", 0),
        ("git clone git@github.com:some/where.git", 0),
        ("@dataclass\nclass Point: ...  # root@localhost", 0),
    ],
)
def test_addresses_count_if_they_may_be_somebodys(text: str, count: int) -> None:
    assert emails(text) == count


@pytest.mark.parametrize(
    ("text", "phones", "cards"),
    [
        ("Call +44 20 7946 0958 or (415) 555-2671.", 2, 0),
        ("My card is 4111 1111 1111 1111, thanks.", 0, 1),
        ("amex 378282246310005", 0, 1),
        ("One digit off: 4111 1111 1111 1112", 0, 0),
        ("1999-2004, 2010 2011 2012 2013", 0, 0),
        ("ISBN 978-3-16-148410-0, at 2023-04-10 12:30:00, 192.168.100.200", 0, 0),
        ("3.141592653589793 and 1,000,000,000 and 1712345678901", 0, 0),
    ],
)
def test_numbers_count_if_one_could_dial_or_charge_them(text: str, phones: int, cards: int) -> None:
    found = scores(text, "Thank you.")
    assert (found.n_phones, found.n_cards) == (phones, cards)


ENGLISH = "The street is empty and the shops along it are closed for the night."
GERMAN = "Die Straße ist leer und die Läden sind für die Nacht geschlossen."


def test_languages_are_told_from_the_text() -> None:
    found = scores(ENGLISH, "Die Straße ist leer, und alle Läden sind geschlossen.")
    assert (found.question_language, found.answer_language, found.language_mismatch) == ("en", "de", True)
    assert scores("画像には何が写っていますか？", "誰もいない夜の通りです。").answer_language == "ja"


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        (ENGLISH, ENGLISH),
        (f"Translate into German: {ENGLISH}", GERMAN),
        (f"Answer in German, please. {ENGLISH}", GERMAN),
        (f"What does this mean? {GERMAN}", "It means that a street is empty and all of its shops are closed."),
        ("What does the sign say?", "Zimmer frei"),
        ("What is the capital of France?", "Paris"),
        ("¿Qué es esto?", "1234567"),
    ],
)
def test_an_answer_in_another_language_is_no_mismatch_if_it_is_asked_for_or_cannot_be_told(
    question: str, answer: str
) -> None:
    assert not scores(question, answer).language_mismatch


def test_russian_questions_of_wildchat_are_russian(shared: Path) -> None:
    rows = json.loads((shared / "data/annotations/wildchat_derived/wildchat_hard_ru.json").read_text())
    found = [scores(row["instruction"], "Да.").question_language for row in rows[:200]]
    assert found.count("ru") > 0.7 * len(found), "others hold code or formulas, too"
    assert {*found} <= {"ru", "en", None}
    assert found.count("en") <= 2, "which begin in English"


@given(st.lists(st.text(max_size=300), min_size=2, max_size=6))
def test_any_text_can_be_scored(texts: list[str]) -> None:
    found = text_scores([Turn("gpt" if i % 2 else "human", text) for i, text in enumerate(texts)])
    assert 0 <= found.repetition <= 1
    assert found.n_words >= found.longest_turn >= found.shortest_answer >= 0
