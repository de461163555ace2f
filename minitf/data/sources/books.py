"""The embedded books: two English Bibles, verse by verse, from packages that need no network."""

import importlib
import re

BOOKS = {"kjv": "King James Bible", "web": "World English Bible"}


def book_verses(source: str) -> dict[int, str]:
    """The verses of the embedded book `source` in order, without numbers, headings or brackets.

    The key of a verse is `book * 1_000_000 + chapter * 1_000 + verse` in both books; each lacks a few of the verses.
    """
    bible = importlib.import_module(f"pythonbible_{source}.plain_text_readers_bible").bible
    verses = {}
    for verse_id in sorted(bible.verse_start_indices):
        start, end = bible.verse_start_indices[verse_id], bible.verse_end_indices[verse_id]
        verse = _clean_verse(bible.scripture_content[start:end], source, book=verse_id // 1_000_000)
        if verse:
            verses[verse_id] = verse
    return verses


def book_chapters(source: str) -> list[str]:
    """The 1,189 chapters of the embedded book `source`, one verse per line."""
    chapters: dict[int, list[str]] = {}
    for verse_id, verse in book_verses(source).items():
        chapters.setdefault(verse_id // 1000, []).append(verse)
    return ["\n".join(verses) + "\n" for verses in chapters.values()]


def aligned_verses() -> list[list[tuple[str, str]]]:
    """The chapters of both books as lists of (King James, World English), of each verse that both have.

    Speech often spans verses: a quotation mark whose partner is in another verse is left out.
    """
    old, new = book_verses("kjv"), book_verses("web")
    chapters: dict[int, list[tuple[str, str]]] = {}
    for verse_id, verse in old.items():
        if verse_id in new:
            chapters.setdefault(verse_id // 1000, []).append((verse, _without_half_quotes(new[verse_id])))
    return list(chapters.values())


def _without_half_quotes(verse: str) -> str:
    opened: list[int] = []
    unmatched: list[int] = []
    for mark in (match.start() for match in re.finditer('"', verse)):
        if mark == 0 or verse[mark - 1] in " (":
            opened.append(mark)
        elif opened:
            opened.pop()
        else:
            unmatched.append(mark)
    halves = {*opened, *unmatched}
    return "".join(char for index, char in enumerate(verse) if index not in halves).strip()


def _clean_verse(verse: str, source: str, book: int) -> str:
    if source == "web":
        # This edition has a heading at the end of the verse before it, a psalm's title even in the chapter before. It
        # writes both single quotes as a backtick, and marks absent verses with a dummy.
        verse = re.sub(r"\s+(BOOK [IVX]+\s+)?Psalm \d+\b.*|(dummy|empty) verses .*", "", verse.strip())
        if book == 19:
            verse = re.sub(r"\s{2,}[A-Z]{3,}( AND SHIN)?$", "", verse)
        if book == 22:
            verse = re.sub(r"\s+(Beloved|Lover|Friends)(?=\s|$)", "", verse)
        verse = verse.replace("`", "'")
    verse = verse.replace("[", "").replace("]", "")
    return " ".join(verse.split()).replace("( ", "(").replace(" )", ")")
