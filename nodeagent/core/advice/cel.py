"""The part of CEL that selectors of DRA usually need. It is evaluated strictly: the rest is refused, never guessed.

Known are `&&`, `||`, `!`, comparisons, `in` with a list or an attribute map, `has(…)`, literals of strings, integers
and booleans, `device.driver`, `device.attributes["DOMAIN"].NAME`, `device.capacity["DOMAIN"].NAME`,
`device.allowMultipleAllocations`, `quantity("…")` with `compareTo`, `isGreaterThan` and `isLessThan`, and of strings
`startsWith`, `endsWith` and `contains`. As in CEL, `&&` and `||` do not fail if the other side decides, values of
different types are not equal, and an attribute that a device lacks is an error, on which the scheduler fails the claim.
Source: Kubernetes 1.37, k8s.io/dynamic-resource-allocation/cel; CEL language definition, "Logical Operators".
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import msgspec

from nodeagent.core.model.quantity import parse_quantity
from nodeagent.errors import InputError

_TOKEN = re.compile(
    r"""\s*(?:(?P<text>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')|(?P<number>-?[0-9]+(?![0-9A-Za-z_.]))|(?P<name>[A-Za-z_]\w*)"""
    r"""|(?P<sign>&&|\|\||==|!=|<=|>=|[!<>()\[\].,]))""",
    re.ASCII,
)
_COMPARE: Mapping[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_OF_TEXT: Mapping[str, Callable[[str, str], bool]] = {
    "startsWith": str.startswith,
    "endsWith": str.endswith,
    "contains": str.__contains__,
}
Variables = Mapping[str, Any]
"""What `device` has: driver, attributes and capacity (by domain and name), allowMultipleAllocations."""
Node = Callable[[Variables], Any]


class CelError(InputError):
    """An expression that fails for a device, such as one that names an attribute that the device lacks."""


class Quantity(msgspec.Struct, frozen=True):
    """A quantity: compared by its methods alone."""

    value: int | Fraction


class Selector(msgspec.Struct, frozen=True):
    """A parsed expression."""

    text: str
    _node: Node

    def matches(self, device: Variables) -> bool:
        """Return whether a device is selected. Raise CelError if the expression fails for it."""
        found = self._node(device)
        if not isinstance(found, bool):
            raise CelError(f"it gives {found!r}, expected true or false")
        return found


def parse(text: str) -> Selector:
    """Return a parsed expression. Raise InputError naming what is not known of it."""
    parser = _Parser(text)
    node = parser.either()
    if parser.kind:
        raise parser.unknown()
    return Selector(text, node)


class _Parser:
    """Reads an expression from left to right; `kind` and `word` are what comes next."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self.kind = self.word = ""
        self._next()

    def unknown(self) -> InputError:
        rest = self._text[self._at - len(self.word) :].strip() or "its end"
        return InputError(
            f"cannot evaluate the CEL expression {self._text!r}: {rest!r} is not of the part of CEL that is known here"
        )

    def _next(self) -> str:
        """Go to the next word; return the one that came before it."""
        before = self.word
        found = _TOKEN.match(self._text, self._at)
        if found is None:
            self.kind = self.word = ""
            if self._text[self._at :].strip():
                self.kind = "strange"
            return before
        self._at = found.end()
        self.kind = found.lastgroup or ""
        self.word = found[self.kind]
        return before

    def _take(self, *words: str) -> str:
        if self.kind in ("sign", "name") and self.word in words:
            return self._next()
        return ""

    def _need(self, word: str) -> None:
        if not self._take(word):
            raise self.unknown()

    def either(self) -> Node:
        node = self._both()
        while self._take("||"):
            node = _decided_by(True, node, self._both())
        return node

    def _both(self) -> Node:
        node = self._compared()
        while self._take("&&"):
            node = _decided_by(False, node, self._compared())
        return node

    def _compared(self) -> Node:
        left = self._not()
        if sign := self._take(*_COMPARE):
            return _comparison(sign, left, self._not())
        if self._take("in"):
            return _membership(left, self._not())
        return left

    def _not(self) -> Node:
        if self._take("!"):
            inner = self._not()
            return lambda device: not _bool(inner(device))
        return self._value()

    def _value(self) -> Node:
        node = self._literal() or self._called() or self._path()
        while self._take("."):
            node = self._method(node)
        return node

    def _literal(self) -> Node | None:
        if self.kind == "text":
            return _constant(_unquoted(self._next()))
        if self.kind == "number":
            return _constant(int(self._next()))
        if word := self._take("true", "false"):
            return _constant(word == "true")
        if self._take("("):
            node = self.either()
            self._need(")")
            return node
        return self._list() if self._take("[") else None

    def _list(self) -> Node:
        nodes = []
        while not self._take("]"):
            nodes.append(self._value())
            if not self._take(","):
                self._need("]")
                break
        return lambda device: [one(device) for one in nodes]

    def _called(self) -> Node | None:
        if self._take("has"):
            self._need("(")
            domain, name = self._attribute()
            self._need(")")
            return lambda device: name in domain(device)
        if self._take("quantity"):
            self._need("(")
            if self.kind != "text":
                raise self.unknown()
            amount = Quantity(parse_quantity(_unquoted(self._next())))
            self._need(")")
            return _constant(amount)
        return None

    def _path(self) -> Node:
        self._need("device")
        self._need(".")
        if word := self._take("driver", "allowMultipleAllocations"):
            return lambda device: device[word]
        domain = self._domain()
        if self.kind != "sign" or self.word != ".":
            return domain
        self._next()
        if self.kind != "name":
            raise self.unknown()
        name = self._next()
        return lambda device: _member(domain(device), name)

    def _attribute(self) -> tuple[Node, str]:
        """Return the map and the name of `device.attributes["DOMAIN"].NAME`."""
        self._need("device")
        self._need(".")
        domain = self._domain()
        self._need(".")
        if self.kind != "name":
            raise self.unknown()
        return domain, self._next()

    def _domain(self) -> Node:
        word = self._take("attributes", "capacity")
        if not word:
            raise self.unknown()
        self._need("[")
        if self.kind != "text":
            raise self.unknown()
        domain = _unquoted(self._next())
        self._need("]")
        return lambda device: device[word].get(domain, {})

    def _method(self, of: Node) -> Node:
        name = self._take(*_OF_TEXT, "compareTo", "isGreaterThan", "isLessThan")
        if not name:
            raise self.unknown()
        self._need("(")
        argument = self._value()
        self._need(")")
        return lambda device: _call(name, of(device), argument(device))


def _constant(value: object) -> Node:
    return lambda device: value


def _unquoted(text: str) -> str:
    inner = text[1:-1]
    if text[0] == "'":
        inner = inner.replace("\\'", "'").replace('"', '\\"')
    try:
        found = json.loads(f'"{inner}"')
    except ValueError:
        raise InputError(f"cannot evaluate the CEL literal {text}: its escapes are not known here") from None
    return str(found)


def _bool(value: object) -> bool:
    if not isinstance(value, bool):
        raise CelError(f"{value!r} is neither true nor false")
    return value


def _decided_by(decisive: bool, left: Node, right: Node) -> Node:
    """Return `&&` (decided by False) or `||` (by True): an error of one side does not count if the other decides."""

    def node(device: Variables) -> bool:
        error = None
        for side in (left, right):
            try:
                if _bool(side(device)) is decisive:
                    return decisive
            except CelError as failed:
                error = failed
        if error is not None:
            raise error
        return not decisive

    return node


def _comparison(sign: str, left: Node, right: Node) -> Node:
    def node(device: Variables) -> bool:
        one, other = left(device), right(device)
        if sign in ("==", "!="):
            return (type(one) is type(other) and one == other) == (sign == "==")
        if type(one) is not type(other) or not isinstance(one, str | int):
            raise CelError(f"{one!r} {sign} {other!r} compares what cannot be compared")
        return _COMPARE[sign](one, other)

    return node


def _membership(left: Node, right: Node) -> Node:
    def node(device: Variables) -> bool:
        some = right(device)
        if not isinstance(some, Mapping | list | tuple):
            raise CelError(f"{some!r} is neither a list nor a map")
        wanted = left(device)
        return any(type(one) is type(wanted) and one == wanted for one in some)

    return node


def _member(domain: Mapping[str, Any], name: str) -> Any:
    if name not in domain:
        raise CelError(f"no such key: {name}")
    return domain[name]


def _call(name: str, of: object, argument: object) -> object:
    if name in _OF_TEXT and isinstance(of, str) and isinstance(argument, str):
        return _OF_TEXT[name](of, argument)
    if name not in _OF_TEXT and isinstance(of, Quantity) and isinstance(argument, Quantity):
        order = (of.value > argument.value) - (of.value < argument.value)
        return {"compareTo": order, "isGreaterThan": order > 0, "isLessThan": order < 0}[name]
    raise CelError(f"{name} is not for {of!r} and {argument!r}")
