"""Patterns of names, as PEFT's ``rank_pattern``: which projection has which rank or scaling."""

import functools
import re
import reprlib
from typing import TypeVar

T = TypeVar("T")

# What a key of a pattern may consist of. Repetition stands after a single character alone, never
# after a group: nested repetitions in a stranger's file could take for ever on a name.
_CHARACTER = r"(?:[\w.-]|\\[.dw-]|\[\^?(?:[\w.-]|\\[.dw-])+\])"
_ITEM = rf"(?:{_CHARACTER}(?:[*+]\??|\?|\{{\d{{1,2}}(?:,\d{{0,2}})?\}})?)"
_NESTING = 4  # groups within groups


def _group(depth: int) -> str:
    inner = "" if depth == 1 else f"{_group(depth - 1)}|"
    return rf"(?:\((?:\?:)?(?:{_ITEM}|{inner}\|)*\)\??)"


_KEY = re.compile(rf"\^?(?:{_ITEM}|{_group(_NESTING)}|\|)*\$?")
_MAX_LENGTH = 500  # of a key
_MAX_KEYS = 4096
_MAX_WAYS = 2**18  # to match a key, and 4 times as many for all keys; see _ways
_MAX_NAME = 64  # characters, about the length of the longest name in a model


@functools.lru_cache(_MAX_KEYS)
def _expression(key: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({key})$")


def matches(key: str, name: str) -> bool:
    """Return whether a key of a pattern fits a module name, by PEFT's rule (``get_pattern_key``).

    The key is a regular expression for the whole name, or for its end from some dot on.
    """
    return _expression(key).match(name) is not None


def look_up(pattern: dict[str, T], name: str, default: T) -> T:
    """Return the value of the first key, in the pattern's order, that fits ``name``."""
    return next((value for key, value in pattern.items() if matches(key, name)), default)


def check_pattern(name: str, pattern: dict) -> None:
    """Raise ValueError unless every key is a regular expression, of a kind that ends soon."""
    if not isinstance(pattern, dict):
        raise ValueError(f"{name} must be a dict, got {reprlib.repr(pattern)}")
    if len(pattern) > _MAX_KEYS:
        raise ValueError(f"{name} has {len(pattern)} keys, and {_MAX_KEYS} are the most")
    for key in pattern:
        _check_key(name, key)
    if sum(map(_ways, pattern)) > 4 * _MAX_WAYS:
        raise ValueError(
            f"{name} has too many keys with '*', '+', '?', {{n}} or '|': matching them might take "
            "for ever; use names without them"
        )


def _check_key(name: str, key: object) -> None:
    if not isinstance(key, str):
        raise ValueError(f"{name}: a key must be a string, got {key!r}")
    if len(key) > _MAX_LENGTH:
        raise ValueError(f"{name}: a key has {len(key)} characters, and {_MAX_LENGTH} are the most")
    try:
        _expression(key)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{name}: {key!r} is not a regular expression: {error}") from error
    if not _KEY.fullmatch(key) or _ways(key) > _MAX_WAYS:
        raise ValueError(
            f"{name}: {key!r} is refused, because matching it might take for ever: a key may have "
            "names, '.', '\\.', classes such as [0-3], and groups (a|b); '*', '+', '?' or {n} may "
            "stand after one of these except a group, at most three times. Otherwise give the "
            "names themselves, each as a key"
        )


def _ways(key: str) -> int:
    """Return about how many ways a regular expression has to match a name."""
    plain = re.sub(r"\\.|\[[^\]]*\]", "x", key).replace("(?:", "(")
    repeated = _MAX_NAME ** len(re.findall(r"[*+{]", plain))
    ways = repeated * 2 ** plain.count("?")
    while group := re.search(r"\(([^()]*)\)", plain):  # the innermost first
        ways *= group[1].count("|") + 1
        plain = plain[: group.start()] + plain[group.end() :]
    return ways * (plain.count("|") + 1)
