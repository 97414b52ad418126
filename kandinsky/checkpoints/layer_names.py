"""Which layers an adapter's config means: names, and the few regular expressions that people write for names.

peft takes the keys of `rank_pattern` and `alpha_pattern` for regular expressions that have to match a layer's name from
one of its dots to its end. Who compiles a stranger's expression can be made to compute for days with a line of it. So
none is compiled here: of expressions letters, `\\d`, `\\w` and `.`, each with `*` or `+`, and `^` and `$` at the ends
are read, and matched in one pass over a name. Whatever else there may be is refused, never ignored: an adapter of
which half the layers have another strength looks like one that was trained badly.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kandinsky.common.given import shown

# How much of it is read; peft writes names, as many as there are layers.
MAX_EXPRESSIONS = 16
MAX_TOKENS = 64
_NAME = re.compile(r"(?:[\w-]|\\?\.)+")  # with dots, escaped or not
_TOKEN = re.compile(r"(?P<letter>\\[dw.]|[\w.-])(?P<count>[*+]?)")


@dataclass(frozen=True)
class Token:
    letter: str  # itself, or what stands for several: \\d, \\w, and . for any
    count: str  # "" once, "*" any number of times, "+" at least once

    def fits(self, letter: str) -> bool:
        if self.letter in ("\\d", "\\w"):
            return letter.isdigit() or (self.letter == "\\w" and (letter.isalnum() or letter == "_"))
        return self.letter == "." or self.letter.removeprefix("\\") == letter


class LayerNames:
    """Values by names of layers, or ends of names; see the module.

    field: what messages call it. Raises ValueError for expressions that are not read here.
    """

    def __init__(self, field: str, values: Mapping[str, Any]) -> None:
        # What is found first counts, so each has its place; names by themselves, because there may be thousands.
        self._names: dict[tuple[str, bool], tuple[int, Any]] = {}
        self._expressions: list[tuple[list[Token], bool, int, Any]] = []
        for place, (text, value) in enumerate(values.items()):
            body, is_whole = text.removeprefix("^").removesuffix("$"), text.startswith("^")
            if _NAME.fullmatch(body):
                self._names.setdefault((body.replace("\\.", "."), is_whole), (place, value))
            else:
                self._expressions.append((_tokens(field, text, body), is_whole, place, value))
        if (count := len(self._expressions)) > MAX_EXPRESSIONS:
            raise ValueError(f"{field} has {count} regular expressions; read are {MAX_EXPRESSIONS}, and names")

    def value(self, layer: str, otherwise: Any) -> Any:
        """The value of the first name or expression that is the layer's name, or unless it begins with ^ its end."""
        ends = [(layer, True), (layer, False)]
        ends += [(layer[i + 1 :], False) for i, letter in enumerate(layer) if letter == "."]
        found = [self._names[end] for end in ends if end in self._names]
        found += [(place, value) for tokens, whole, place, value in self._expressions if _matches(tokens, layer, whole)]
        return min(found, key=lambda one: one[0])[1] if found else otherwise


def _tokens(field: str, text: str, body: str) -> list[Token]:
    tokens: list[Token] = []
    end = 0
    while end < len(body) and len(tokens) <= MAX_TOKENS and (match := _TOKEN.match(body, end)):
        tokens.append(Token(match["letter"], match["count"]))
        end = match.end()
    if end < len(body) or len(tokens) > MAX_TOKENS:
        raise ValueError(
            f"{shown(text)} in {field} is not a regular expression that is read here: names with \\d, \\w, ., * and "
            f"+, of at most {MAX_TOKENS} letters; write the layers' names instead"
        )
    return tokens


def _matches(tokens: list[Token], name: str, whole: bool) -> bool:
    """Whether all of `name`, or unless `whole` its end after a dot, is what the tokens say."""

    def skipping(reached: set[int]) -> set[int]:
        """With the places that are reached where tokens come no times at all."""
        for i, token in enumerate(tokens):
            if i in reached and token.count == "*":
                reached.add(i + 1)
        return reached

    reached = skipping({0})  # so many tokens have been matched
    for letter in name:
        moved = {0} if letter == "." and not whole else set()
        for i in reached:
            if i < len(tokens) and tokens[i].fits(letter):
                moved |= {i + 1, i} if tokens[i].count else {i + 1}
        reached = skipping(moved)
    return len(tokens) in reached
