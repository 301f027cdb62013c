"""What may be asked of a generation: every option, its default and its check, in one place.

Options come from Python, the command line, an evaluation or a server's JSON. None means the
default everywhere; a number of another type that has the same value is taken (40.0 for 40), and
anything else is one GenerationError that names the option, the value and what was expected.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

from amx_tvm.errors import AmxError, GenerationError

if TYPE_CHECKING:
    from amx_tvm.images import ImageInput
    from amx_tvm.runtime.session import Sequence

DEFAULT_NEW_TOKENS = 128
MOST_LOGPROBS = 128
_GREEDY_BELOW = 1e-6  # temperatures at which float32 logits next to each other are all or nothing


def number(
    low: float | None = None,
    high: float | None = None,
    whole: bool = False,
    above: bool = False,
    note: str = "",
    error: type[AmxError] = GenerationError,
) -> Callable[[str, Any], Any]:
    """Return a check of numbers in [low, high], or (low, high] where ``above`` is set.

    The check takes an option's name and value and returns the number; it raises ``error`` for
    anything else.
    """
    kind = "an integer" if whole else "a number"
    if high is not None:
        bounds = f" above {low} and at most {high}" if above else f" from {low} to {high}"
    elif low is not None:
        bounds = f" above {low}" if above else f" of at least {low}"
    else:
        bounds = ""
    expected = f"expected {kind}{bounds}{note}"

    def check(name: str, value: Any) -> Any:
        found: Any = None
        if isinstance(value, numbers.Real) and not isinstance(value, bool):
            found = _whole(value) if whole else _finite(value)
        if (
            found is None
            or (low is not None and (found < low or (above and found == low)))
            or (high is not None and found > high)
        ):
            raise error(f"{name} is {value!r}, {expected}")
        return found

    return check


def _whole(value: Any) -> int | None:
    """Return a real number as an int, None where it is not whole."""
    try:
        return operator.index(value)
    except TypeError:
        return int(value) if math.isfinite(value) and value == int(value) else None


def _finite(value: Any) -> float | None:
    """Return a real number as a float, None where there is none of its size."""
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def flag(name: str, value: Any) -> bool:
    """Check an option that is true or false."""
    if not isinstance(value, bool):
        raise GenerationError(f"{name} is {value!r}, expected true or false")
    return value


def text(name: str, value: Any) -> str:
    """Check a text: of characters only.

    Python and JSON hand bytes and halves of characters that they cannot decode on as lone
    surrogates, which no tokenizer takes.
    """
    if not isinstance(value, str):
        raise GenerationError(f"{name} is {value!r}, expected a text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise GenerationError(
            f"{name} holds a byte that is no UTF-8, or half a character, behind {error.start} "
            "characters; convert it, for example with iconv"
        ) from None
    return value


def texts(name: str, value: Any) -> tuple[str, ...]:
    """Check a text or several; none may be empty."""
    found = (value,) if isinstance(value, str) else tuple(_items(name, value, "texts"))
    for one in found:
        if not isinstance(one, str) or not one:
            raise GenerationError(f"{name} holds {one!r}, expected texts of at least a character")
        text(name, one)
    return found


def token_ids(name: str, value: Any) -> frozenset[int]:
    """Check a set of token ids."""
    check = number(0, whole=True)
    return frozenset(check(f"a token of {name}", v) for v in _items(name, value, "token ids"))


def biases(name: str, value: Any) -> dict[int, float]:
    """Check a mapping from token ids to what is added to their logits; JSON's keys are texts."""
    if not isinstance(value, Mapping):
        raise GenerationError(f"{name} is {value!r}, expected a mapping of token ids to numbers")
    token, bias = number(0, whole=True), number(-100, 100)
    return {
        token(
            f"a token of {name}",
            int(k) if isinstance(k, str) and k.isdecimal() and len(k) < 20 else k,
        ): bias(f"{name}[{k}]", v)
        for k, v in value.items()
    }


def _items(name: str, value: Any, kind: str) -> Iterable[Any]:
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise GenerationError(f"{name} is {value!r}, expected a list of {kind}")
    return value


def _option(default: Any, check: Callable[[str, Any], Any]) -> Any:
    if isinstance(default, dict):
        return field(default_factory=dict, metadata={"check": check})
    return field(default=default, metadata={"check": check})


_Kind = TypeVar("_Kind", bound="_Options")


class _Options:
    """Base of the dataclasses below: None becomes the default, everything else is checked."""

    def __post_init__(self) -> None:
        for entry in fields(self):  # type: ignore[arg-type]
            value = getattr(self, entry.name)
            if value is None:
                default = entry.default if entry.default is not MISSING else {}
                object.__setattr__(self, entry.name, default)
            else:
                object.__setattr__(self, entry.name, entry.metadata["check"](entry.name, value))


@dataclass(frozen=True)
class Sampling(_Options):
    """How tokens are chosen.

    Attributes
    ----------
    temperature : float
        0 takes the most likely token (greedy; the limits below are then without effect). So does
        anything under 1e-6.
    top_k : int
        Keep the k most likely tokens; 0 keeps all.
    top_p : float
        Keep the smallest set of most likely tokens whose probabilities reach p; 1 keeps all.
    min_p : float
        Drop tokens less likely than min_p times the most likely one; 0 keeps all.
    repetition_penalty : float
        Divide positive logits of tokens seen before by this, multiply negative ones; 1 is off.
        From 0.01 to 100: what float32 logits bear.
    presence_penalty : float
        Taken from the logit of every token that was generated before.
    frequency_penalty : float
        Taken from a token's logit as often as it was generated before.
    logit_bias : dict of int to float
        Added to the logits of these tokens.
    logprobs : int or None
        Record each chosen token's log-probability and those of so many most likely tokens, before
        penalties and temperature; None records nothing.
    seed : int or None
        Same seed, same choices; None draws one from the system.
    """

    temperature: float = _option(0.0, number(0))
    top_k: int = _option(0, number(0, whole=True, note=" (0 keeps all)"))
    top_p: float = _option(1.0, number(0, 1, above=True))
    min_p: float = _option(0.0, number(0, 1))
    repetition_penalty: float = _option(1.0, number(0.01, 100, note=" (1 is off)"))
    presence_penalty: float = _option(0.0, number(-100, 100))
    frequency_penalty: float = _option(0.0, number(-100, 100))
    logit_bias: dict[int, float] = _option({}, biases)
    logprobs: int | None = _option(None, number(0, MOST_LOGPROBS, whole=True))
    seed: int | None = _option(None, number(0, whole=True))

    @property
    def draws(self) -> bool:
        """Whether tokens are drawn at random rather than taken by their rank."""
        return self.temperature >= _GREEDY_BELOW

    @property
    def penalizes(self) -> bool:
        """Whether logits change by what was said before."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )

    @property
    def likeliest(self) -> bool:
        """Whether the most likely one of the tokens that are allowed is taken."""
        return not (self.draws or self.penalizes or self.logit_bias)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken, whatever was said before, and nothing noted."""
        return self.likeliest and self.logprobs is None


@dataclass(frozen=True)
class Limits(_Options):
    """When a generation ends.

    Attributes
    ----------
    max_new_tokens : int
        Most tokens to choose.
    min_tokens : int
        So many tokens come before EOS or another token that ends the generation may be chosen.
    stop : tuple of str
        Strings that end the text; they are not part of it. One that is a special token ends it when
        the model chooses the token.
    stop_token_ids : frozenset of int
        Tokens that end it, beside the model's own.
    ignore_eos : bool
        Go on after the model's own tokens that end a text (for measurements).
    """

    max_new_tokens: int = _option(DEFAULT_NEW_TOKENS, number(1, whole=True))
    min_tokens: int = _option(0, number(0, whole=True))
    stop: tuple[str, ...] = _option((), texts)
    stop_token_ids: frozenset[int] = _option(frozenset(), token_ids)
    ignore_eos: bool = _option(False, flag)


class OptionsBesides(TypedDict, total=False):
    """The options of `Sampling` and `Limits` but ``max_new_tokens``, for those who check types."""

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    logprobs: int | None
    seed: int | None
    min_tokens: int | None
    stop: str | Iterable[str] | None
    stop_token_ids: Iterable[int] | None
    ignore_eos: bool | None


class RequestOptions(OptionsBesides, total=False):
    """All options of a generation."""

    max_new_tokens: int | None


class GenerateOptions(OptionsBesides, total=False):
    """What `Engine.generate` and `Engine.stream` take beside the prompt and its length."""

    sequence: Sequence | None
    adapter: str | None
    images: Iterable[ImageInput] | None
    mask: Callable[..., Any] | None


def _take(kind: type[_Kind], options: dict[str, Any]) -> _Kind:
    """Return the options of a class, which are taken out of ``options``."""
    names = [entry.name for entry in fields(kind)]  # type: ignore[arg-type]
    return kind(**{name: options.pop(name) for name in names if name in options})


def read_options(options: Mapping[str, Any]) -> tuple[Sampling, Limits]:
    """Return the options of a generation, checked.

    Raises
    ------
    GenerationError
        An option that there is not, or a value that it cannot have.
    """
    left = dict(options)
    read = _take(Sampling, left), _take(Limits, left)
    if left:
        known = sorted(entry.name for kind in (Sampling, Limits) for entry in fields(kind))
        raise GenerationError(
            f"unknown generation option {next(iter(left))!r}; there are {', '.join(known)}"
        )
    return read
