"""Harmful words in text, by a list per language that the user can replace."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from raytune_lora.config.yaml_text import read_yaml
from raytune_lora.errors import UserError

PACKAGED = Path(__file__).with_name("harmful_words.yaml")
# Hangul, kana and Chinese characters: scripts in which particles or other words follow without a space.
_JOINED = "\u1100-\u11ff\u3040-\u30ff\u3130-\u318f\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
_IS_JOINED = re.compile(f"[{_JOINED}]")
_LETTER = rf"[^\W{_JOINED}]"  # of a script that puts spaces between words

_TOKEN = re.compile(rf"{_LETTER}+")
LONGEST = 100  # characters of a word or phrase
_MOST = 1_000_000  # words
WHITE = r"\s{1,9}"  # between the words of a phrase

_Tree = dict[str, Any]  # of characters; the key "" says that a word ends there


@dataclass(frozen=True)
class Words:
    """Words and phrases by language, such as ``{"en": ("slur", "a phrase")}``."""

    languages: dict[str, tuple[str, ...]]

    def find(self, text: str) -> list[str]:
        """The list's words that are in the text, each once, in the order in which they come first.

        Case and width of letters do not matter, nor what kind of space is between the words of a phrase. In scripts
        without spaces between words a word is found inside others; in the other scripts only by itself.
        """
        folded = _folded(text)
        matches: list[re.Match[str]] = []
        if not self._telling.isdisjoint(["", *_TOKEN.findall(folded)]):
            matches += self._spaced.finditer(folded)
        if not folded.isascii():
            matches += self._joined.finditer(folded)
        keys = (_key(match.group()) for match in sorted(matches, key=re.Match.start))
        return list(dict.fromkeys(self._listed[key] for key in keys))

    @cached_property
    def _listed(self) -> dict[str, str]:
        """The words as the list has them, by their key."""
        return {_key(_folded(word)): word for words in self.languages.values() for word in words}

    @cached_property
    def _folded_words(self) -> list[str]:
        return [" ".join(_folded(word).split()) for words in self.languages.values() for word in words]

    @cached_property
    def _telling(self) -> frozenset[str]:
        """Of every phrase its longest word: a text with none of these needs no search."""
        words = (word for word in self._folded_words if not _IS_JOINED.search(word))
        return frozenset(max(_TOKEN.findall(word), key=len, default="") for word in words)

    @cached_property
    def _spaced(self) -> re.Pattern[str]:
        """One alternation, nested by common beginnings: a text is read once, however long the list is."""
        nested = _nested([word for word in self._folded_words if not _IS_JOINED.search(word)], space=WHITE)
        return re.compile(rf"(?<!{_LETTER})(?:{nested})(?!{_LETTER})")

    @cached_property
    def _joined(self) -> re.Pattern[str]:
        return re.compile(_nested([word for word in self._folded_words if _IS_JOINED.search(word)], f"(?:{WHITE})?"))


def load_words(path: str | None) -> Words:
    """Words of a YAML file that maps each language to a list of words; None is the list that comes with the package.

    Raises:
        UserError: the file is missing, is not YAML, or is not of that form.
    """
    where = Path(path).expanduser() if path is not None else PACKAGED
    wrong = f"data.quality.harmful_words={where}"
    form = "write each language as a key with a list of quoted words, such as en: ['one', 'another']"
    try:
        content = read_yaml(where.read_bytes(), str(where), _MOST)
    except OSError as error:
        raise UserError(f"{wrong} cannot be read ({error.strerror}): name a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{wrong} is not YAML ({reason}): {form}") from None
    if not isinstance(content, dict) or not content:
        raise UserError(f"{wrong} must map languages to words, but holds {_shown(content)}: {form}")
    problems: list[str] = []
    for language, words in content.items():
        if not isinstance(language, str):
            problems.append(f"{wrong} has the language {_shown(language)}, which is not text: put it in quotes")
        elif not isinstance(words, list) or not words:
            problems.append(f"{wrong} must have a list of words for {language}, but has {_shown(words)}: {form}")
        else:
            problems += [
                f"{wrong} has {_shown(word)} as a word of {language}: write 1 to {LONGEST} characters, in quotes"
                for word in words
                if not (isinstance(word, str) and 0 < len(_key(_folded(word))) <= LONGEST)
            ]
    if problems:
        raise UserError(problems)
    return Words({language: tuple(words) for language, words in content.items()})


def _shown(value: object) -> str:
    text = repr(value)
    return "nothing" if value is None else text if len(text) <= 60 else text[:60] + "…"


def _folded(text: str) -> str:
    """Without case, and without the forms of letters that only look different."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text).replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    return text.casefold()


def _key(word: str) -> str:
    """What stays the same however a word's parts are spaced."""
    return ("" if _IS_JOINED.search(word) else " ").join(word.split())


def _nested(words: list[str], space: str) -> str:
    """A pattern of any of the words, the longest where several fit, with ``space`` as the pattern of their spaces."""
    if not words:
        return "(?!)"
    tree: _Tree = {}
    for word in words:
        node = tree
        for character in word:
            node = node.setdefault(character, {})
        node[""] = {}
    return _alternatives(tree, space)


def _alternatives(node: _Tree, space: str) -> str:
    branches = [
        (space if character == " " else re.escape(character)) + _alternatives(below, space)
        for character, below in sorted(node.items())
        if character
    ]
    pattern = "|".join(branches)
    if "" in node:
        return f"(?:{pattern})?" if branches else ""
    return f"(?:{pattern})" if len(branches) > 1 else pattern
