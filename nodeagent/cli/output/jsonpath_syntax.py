"""The syntax of -o jsonpath: a template as steps. A subset of kubectl's, without functions and scripts.

    text {.a.b} {.a\\.b} {['a.b']} {['a\\.b']} {['a','b']} {$} {@} {[0]} {[-1]} {[0,2]} {[1:3]} {[::2]} {[*]} {.*}
    {..name} {[?(@.a=="x")]} {[?(@.a)]}, also with != < <= > >=      {range .a[*]}…{end}      {"text\\n"}

A dot within a quoted name separates names too, unless it is escaped.
Source: kubernetes.io/docs/reference/kubectl/jsonpath, and util/jsonpath of client-go.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from nodeagent.errors import InputError


class Text(NamedTuple):
    """Text that is printed as it is."""

    text: str


class Keys(NamedTuple):
    """Members of an object. paths: the names that lead to each."""

    paths: Sequence[Sequence[str]]


class Indexes(NamedTuple):
    """Elements of a list; negative ones count from its end."""

    numbers: Sequence[int]


class Slice(NamedTuple):
    """Elements of a list from `start` up to and without `stop`."""

    start: int | None
    stop: int | None
    step: int | None


class Every(NamedTuple):
    """All elements of a list, or all members of an object."""


class Deep(NamedTuple):
    """The value and everything below it."""


class Filter(NamedTuple):
    """Elements for which a path finds something, or something that compares."""

    left: Path
    operator: str
    right: Any
    """A literal, or a Path."""


Step = Keys | Indexes | Slice | Every | Deep | Filter


class Path(NamedTuple):
    """A path from the current value, or from the whole document."""

    steps: Sequence[Step]
    from_root: bool = False


class Range(NamedTuple):
    """Parts that are printed for each value of a path."""

    path: Path
    parts: Sequence[Any]


Part = Text | Path | Range
OPERATORS = ("==", "!=", "<=", ">=", "<", ">")
_NAME = re.compile(r"(?:\\.|[^\s.,\[\](){}$@\\=<>!~'\"*?:;|])+")
_QUOTED_NAME = re.compile(r"'((?:\\.|[^'\\])+)'|\"((?:\\.|[^\"\\])+)\"")
_NAME_PART = re.compile(r"(?:\\.|[^.\\])+")
_SLICE = re.compile(r"\s*(-?\d{1,9})?\s*:\s*(-?\d{1,9})?\s*(?::\s*(\d{1,9})?\s*)?\]")
_INDEXES = re.compile(r"\s*(-?\d{1,9}(?:\s*,\s*-?\d{1,9})*)\s*\]")
_NUMBER = re.compile(r"-?\d{1,18}(?:\.\d{1,18})?")
_WORD = re.compile(r"\w+")
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\", '"': '"', "'": "'", "/": "/"}
_LITERALS = {"true": True, "false": False, "null": None}
_DEEPEST = 8
"""Ranges and filters within each other."""


def parse(template: str) -> Sequence[Part]:
    """Return the parts of a template. Raise InputError with the place of what is not understood."""
    reader = _Reader(template)
    parts = reader.parts(0)
    if not any(isinstance(part, Path | Range) for part in parts) and "{" not in template:
        raise reader.error("expected a path in braces, such as {.id}", 0)
    return parts


class _Reader:
    """Reads a template from left to right."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def error(self, why: str, at: int | None = None) -> InputError:
        """Return an error at a place, or where the reader stands."""
        place = self._at if at is None else at
        rest = repr(self._text[place : place + 20]) if place < len(self._text) else "its end"
        return InputError(f"cannot use jsonpath, at character {place + 1}, {rest}: {why}")

    def parts(self, depth: int) -> list[Part]:
        """Return the parts up to the end of the template, or, within a range, up to its {end}."""
        found: list[Part] = []
        while self._at < len(self._text):
            brace = self._text.find("{", self._at)
            if brace != self._at:
                stop = len(self._text) if brace < 0 else brace
                found.append(Text(self._text[self._at : stop]))
                self._at = stop
                continue
            began = self._at
            self._at += 1
            self._blanks()
            if self._word("end"):
                if not depth:
                    raise self.error("there is no range to end", began)
                self._expect("}")
                return found
            found.extend(self._action(depth, began))
        if depth:
            raise self.error("a range lacks its {end}")
        return found

    def _action(self, depth: int, began: int) -> list[Part]:
        if self._word("range"):
            if depth == _DEEPEST:
                raise self.error(f"more than {_DEEPEST} ranges in each other", began)
            path = self._path(depth)
            self._expect("}")
            return [Range(path, self.parts(depth + 1))]
        found: list[Part] = []
        while not self._take("}"):
            if self._peek() in ("'", '"'):
                found.append(Text(self._quoted()))
            elif self._peek() == "":
                raise self.error("a brace is not closed", began)
            else:
                found.append(self._path(depth))
            self._blanks()
        if not found:
            raise self.error("expected a path between the braces", began)
        return found

    # Paths

    def _path(self, depth: int) -> Path:
        self._blanks()
        began = self._at
        from_root = self._take("$")
        relative = not from_root and self._take("@")
        steps: list[Step] = []
        while True:
            if self._take(".."):
                steps.append(Deep())
                if self._peek() != "[":
                    steps.append(self._member())
            elif self._take("."):
                if self._peek() == "[" or (not steps and self._peek() in ("", "}", " ", ")")):
                    continue
                steps.append(self._member())
            elif self._take("["):
                steps.append(self._brackets(depth))
            else:
                break
        if self._at == began or not (steps or from_root or relative or self._text[began] == "."):
            raise self.error("expected a path such as .id")
        return Path(tuple(steps), from_root)

    def _member(self) -> Step:
        if self._take("*"):
            return Every()
        found = _NAME.match(self._text, self._at)
        if found is None:
            raise self.error("expected a name or *")
        self._at = found.end()
        return Keys(((_unescaped(found[0]),),))

    def _brackets(self, depth: int) -> Step:
        self._blanks()
        if self._take("*"):
            self._expect("]")
            return Every()
        if self._take("?("):
            return self._filter(depth)
        if self._peek() in ("'", '"'):
            return self._names()
        if found := _INDEXES.match(self._text, self._at):
            self._at = found.end()
            return Indexes(tuple(int(one) for one in found[1].split(",")))
        if found := _SLICE.match(self._text, self._at):
            self._at = found.end()
            start, stop, step = (int(one) if one else None for one in found.groups())
            if step == 0:
                raise self.error("a slice cannot have step 0", found.start())
            return Slice(start, stop, step)
        raise self.error("expected *, a number, a slice, a quoted name or ?( between the brackets")

    def _names(self) -> Keys:
        paths = [self._quoted_name()]
        while self._after_blanks(","):
            self._blanks()
            paths.append(self._quoted_name())
        self._expect("]")
        return Keys(tuple(paths))

    def _quoted_name(self) -> tuple[str, ...]:
        found = _QUOTED_NAME.match(self._text, self._at)
        if found is None:
            raise self.error("expected a name in quotes")
        self._at = found.end()
        return tuple(map(_unescaped, _NAME_PART.findall(found[1] or found[2])))

    def _filter(self, depth: int) -> Filter:
        if depth >= _DEEPEST:
            raise self.error(f"more than {_DEEPEST} filters in each other")
        left = self._path(depth + 1)
        self._blanks()
        operator = next((one for one in OPERATORS if self._take(one)), "")
        right = self._operand(depth + 1) if operator else None
        self._expect(")")
        self._expect("]")
        return Filter(left, operator, right)

    def _operand(self, depth: int) -> Any:
        self._blanks()
        if self._peek() in ("'", '"'):
            return self._quoted()
        if number := _NUMBER.match(self._text, self._at):
            self._at = number.end()
            return float(number[0]) if "." in number[0] else int(number[0])
        word = _WORD.match(self._text, self._at)
        if word is not None and word[0] in _LITERALS:
            self._at = word.end()
            return _LITERALS[word[0]]
        if self._peek() in ("@", "$", "."):
            return self._path(depth)
        raise self.error("expected a quoted text, a number, true, false or a path")

    # Characters

    def _quoted(self) -> str:
        quote, began = self._peek(), self._at
        if quote not in ("'", '"'):
            raise self.error("expected a quoted text")
        self._at += 1
        letters: list[str] = []
        while not self._take(quote):
            letter = self._peek()
            if letter == "":
                raise self.error("a quote is not closed", began)
            self._at += 1
            letters.append(self._escaped() if letter == "\\" else letter)
        return "".join(letters)

    def _escaped(self) -> str:
        letter = self._peek()
        if letter not in _ESCAPES:
            raise self.error("unknown escape", self._at - 1)
        self._at += 1
        return _ESCAPES[letter]

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _blanks(self) -> None:
        while self._peek().isspace():
            self._at += 1

    def _take(self, text: str) -> bool:
        found = self._text.startswith(text, self._at)
        self._at += len(text) if found else 0
        return found

    def _after_blanks(self, text: str) -> bool:
        self._blanks()
        return self._take(text)

    def _word(self, word: str) -> bool:
        found = _WORD.match(self._text, self._at)
        return found is not None and found[0] == word and self._take(word)

    def _expect(self, text: str) -> None:
        self._blanks()
        if not self._take(text):
            raise self.error(f"expected {text}")


def _unescaped(name: str) -> str:
    """Return a name without the backslashes that escape its characters."""
    return re.sub(r"\\(.)", r"\1", name)
