"""The exercises in reference: held out by construction, balanced, and out of reach for what looks at positions."""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable
from itertools import product

import pytest

from minitf.data.config import DataConfig
from minitf.data.sources.pairs import open_pairs
from minitf.data.sources.references import (
    ADJECTIVES,
    EXAMPLES,
    NOUN_PAIRS,
    PRONOUNS,
    VERBS,
    WINOGRAD,
    Case,
    cases_of,
    pronoun_cases,
    pronoun_sentences,
    winograd_cases,
    winograd_pairs,
)
from minitf.data.sources.text import open_text
from minitf.errors import RequestError

both_languages = pytest.mark.parametrize("language", ["en", "zh"])
DEEDS = {lang: {n: deed for c in classes for n, deed in c.deeds.items()} for lang, classes in PRONOUNS.items()}
CLASS = {lang: {n: c.pronoun for c in classes for n in c.deeds} for lang, classes in PRONOUNS.items()}


def read(sentence: str, language: str) -> tuple[str, str, str, str, str]:
    """First noun, verb, second noun, pronoun, deed."""
    pattern = r"The (\w+) (\w+) the (\w+)\. (\w+) (\w+)\." if language == "en" else "(.)(.)(.)。(.)(.)。"
    found = re.fullmatch(pattern, sentence)
    assert found, sentence
    return found.groups()  # type: ignore[return-value]


@both_languages
def test_each_of_7200_sentences_names_the_deed_of_the_one_who_is_meant(language: str) -> None:
    sentences = [sentence for sentence, _ in pronoun_sentences(language, 0.2)]
    assert len(set(sentences)) == len(sentences) == 7200
    for sentence in sentences:
        first, verb, second, pronoun, deed = read(sentence, language)
        assert verb in VERBS[language]
        assert CLASS[language][first] != CLASS[language][second]
        (meant,) = (noun for noun in (first, second) if CLASS[language][noun] == pronoun)
        assert deed == DEEDS[language][meant]


@both_languages
def test_a_fifth_of_the_noun_pairs_is_held_out_in_both_orders(language: str) -> None:
    split: dict[frozenset[str], set[bool]] = {}
    held_out_nouns: Counter[str] = Counter()
    for sentence, held_out in pronoun_sentences(language, 0.2):
        first, _, second, pronoun, _ = read(sentence, language)
        split.setdefault(frozenset((first, second)), set()).add(held_out)
        held_out_nouns[first if CLASS[language][first] == pronoun else second] += held_out
    assert all(len(sides) == 1 for sides in split.values())
    assert sum(sides == {True} for sides in split.values()) == len(split) // 5 == 60
    assert set(held_out_nouns.values()) == {48}  # each of the 30 nouns is meant equally often


@both_languages
def test_the_cases_are_the_held_out_sentences(language: str) -> None:
    cases = pronoun_cases(language)
    stop = "." if language == "en" else "。"
    written = [case.said.prefix + case.said.answer + stop for case in cases]
    assert sorted(written) == sorted(sentence for sentence, held_out in pronoun_sentences(language, 0.2) if held_out)
    assert Counter(case.choosing for case in cases) == {True: 720, False: 720}
    pairs = {side: {frozenset((c.referent, c.other)) for c in cases if c.choosing is side} for side in (True, False)}
    assert not pairs[True] & pairs[False]  # heads are chosen on other pairs of nouns than they are judged on


@both_languages
@pytest.mark.parametrize(
    ("known", "reached"),
    [
        ("nearest noun", 0.5), ("first noun", 0.5), ("both nouns", 0.503), ("pronoun and one noun", 0.55),
        ("pronoun", 0.1), ("nothing", 1 / 30),
    ],
)  # fmt: skip
def test_looking_up_less_than_the_meaning_reaches_chance(language: str, known: str, reached: float) -> None:
    views: dict[str, Callable[[str, str, str, str], object]] = {
        "nearest noun": lambda first, verb, second, pronoun: second,
        "first noun": lambda first, verb, second, pronoun: first,
        "both nouns": lambda first, verb, second, pronoun: (first, verb, second),
        "pronoun and one noun": lambda first, verb, second, pronoun: (pronoun, second),
        "pronoun": lambda first, verb, second, pronoun: pronoun,
        "nothing": lambda first, verb, second, pronoun: None,
    }
    deeds: dict[object, Counter[str]] = {}
    for sentence, _ in pronoun_sentences(language, 0.2):
        *words, deed = read(sentence, language)
        deeds.setdefault(views[known](*words), Counter())[deed] += 1
    right = sum(counts.most_common(1)[0][1] for counts in deeds.values())
    assert right / 7200 == pytest.approx(reached, abs=0.005)


@both_languages
@pytest.mark.parametrize("exercise", ["pronouns", "winograd"])
def test_twin_and_control_change_one_noun_each(exercise: str, language: str) -> None:
    def nouns(prefix: str, case: Case) -> set[str]:
        known = set(CLASS[language]) if exercise == "pronouns" else set().union(*WINOGRAD[language].nouns)
        text = re.findall(r"\w+", prefix) if language == "en" else list(prefix)
        return known & set(text)

    for case in cases_of(exercise, language):
        assert case.said.answer in case.candidates
        assert nouns(case.said.prefix, case) == {case.referent, case.other}
        assert nouns(case.twin.prefix, case) & {case.referent, case.other} == {case.other}
        assert nouns(case.control.prefix, case) & {case.referent, case.other} == {case.referent}
        assert case.twin.answer != case.said.answer == case.control.answer


@both_languages
def test_winograd_holds_out_noun_pairs_and_noun_adjective_pairs(language: str) -> None:
    num_pairs = 3000
    trained: set[tuple[str, str]] = set()
    said: Counter[tuple[str, str]] = Counter()
    nouns = [noun for kind in WINOGRAD[language].nouns for noun in kind]
    orders: Counter[bool] = Counter()
    pairs = list(winograd_pairs(language, num_pairs, 0.2))
    assert len(dict.fromkeys(source for (source, _), _ in pairs)) == num_pairs
    for (source, target), held_out in pairs:
        words = re.findall(r"\w+", source) if language == "en" else list(source)
        first, second = (word for word in words if word in nouns)
        adjective = words[-1] if language == "en" else words[-2]
        told = re.findall(r"\w+", target) if language == "en" else list(target)
        (meant,) = (noun for noun in (first, second) if noun in told[told.index(second) + 1 :] or told.count(noun) == 2)
        orders[meant == first] += 1
        living, thing = (first, second) if first in WINOGRAD[language].nouns[0] else (second, first)
        assert adjective in WINOGRAD[language].adjectives[meant == thing]
        said[meant, adjective] += not held_out
        if not held_out:
            trained |= {(living, thing)}
    assert orders[True] / num_pairs == pytest.approx(0.5, abs=0.05)
    cases = winograd_cases(language)
    unseen = {(c.referent, c.other) for c in cases if c.group == NOUN_PAIRS}
    assert not unseen & (trained | {pair[::-1] for pair in trained})
    for case in cases:
        if case.group == ADJECTIVES:
            adjective = case.said.source.split()[-1][:-1] if language == "en" else case.said.source[-2]
            assert said[case.referent, adjective] == 0
    assert Counter((c.group, c.choosing) for c in cases) == Counter(
        dict.fromkeys(product((NOUN_PAIRS, ADJECTIVES), (True, False)), 250)
    )


def test_every_chinese_word_is_one_character_of_one_meaning() -> None:
    words = [*DEEDS["zh"], *DEEDS["zh"].values(), *VERBS["zh"], *(c.pronoun for c in PRONOUNS["zh"])]
    assert all(len(word) == 1 for word in words)
    assert len(set(words)) == len(words)
    vocabulary = WINOGRAD["zh"]
    words = [word for group in (*vocabulary.nouns, *vocabulary.adjectives, vocabulary.relations) for word in group]
    assert all(len(word) == 1 for word in words)
    assert len(set(words)) == len(words)


@both_languages
def test_the_sentence_to_watch_is_one_of_the_exercise(language: str) -> None:
    sentences = dict(pronoun_sentences(language, 0.2))
    example = EXAMPLES["pronouns", language]
    assert sentences[example.text]  # and is held out
    assert example.text.startswith(example.prompt)
    source, _ = EXAMPLES["winograd", language].text.split(" => ")
    pairs = dict(pair for pair, held_out in winograd_pairs(language, 20_000, 0.2) if not held_out)
    assert source not in pairs
    vocabulary = WINOGRAD[language]
    words = re.findall(r"\w+", source) if language == "en" else list(source)
    assert {words[1], words[5]} == {"cat", "mat"} or {words[0], words[2]} == {"猫", "垫"}
    assert words[-1 if language == "en" else -2] in vocabulary.adjectives[0]


def test_sources_say_what_they_are() -> None:
    text = open_text(DataConfig(source="pronouns", val_fraction=0.2, language="zh"))
    assert "7,200 sentences in Chinese, 20% of the noun pairs held out" in text.description
    pairs = open_pairs(DataConfig(kind="pairs", source="winograd", val_fraction=0.2, num_pairs=100))
    assert "100 pairs in English" in pairs.description
    with pytest.raises(RequestError, match=r"data.num_pairs=1000000 is more than the exercise has: "):
        next(winograd_pairs("en", 1_000_000, 0.2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "pronouns", "val_fraction": 0.1}, "must be 0.2, 0.3, 0.4 or 0.5"),
        ({"source": "pronouns", "val_fraction": 0.25}, "must be 0.2, 0.3, 0.4 or 0.5"),
        ({"language": "zh"}, "is for pronouns and winograd only"),
        ({"source": "pronouns", "val_fraction": 0.2, "language": "fr"}, "data.language=fr is not known"),
        ({"kind": "pairs", "source": "copy", "document_mask": True}, "is for text"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        dataclasses.replace(DataConfig(**settings))  # type: ignore[arg-type]
