"""What a generation returns: text, tokens, why it ended, and how long its parts took."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Timings:
    """Wall-clock times of one generation.

    Attributes
    ----------
    prefill_tokens : int
        Prompt tokens that were computed (less than the prompt where a prefix was cached).
    prefill_s : float
        Seconds for them.
    decode_tokens : int
        Tokens made by decode steps; the first new token comes from prefill.
    decode_s : float
        Seconds for them, sampling and detokenization included.
    first_token_s : float
        Seconds from the request to the first new token.
    image_s : float
        Seconds in which the prompt's images were seen.
    """

    prefill_tokens: int = 0
    prefill_s: float = 0.0
    decode_tokens: int = 0
    decode_s: float = 0.0
    first_token_s: float = 0.0
    image_s: float = 0.0

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens per second; 0 if none were computed."""
        return self.prefill_tokens / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """New tokens per second after the first; 0 if there was none."""
        return self.decode_tokens / self.decode_s if self.decode_s else 0.0


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities at one position, of the model's own distribution.

    Attributes
    ----------
    token : int
        The token that was chosen.
    logprob : float
        Its own.
    top : list of (int, float)
        The most likely tokens with theirs, best first.
    """

    token: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass
class GenerationResult:
    """The outcome of one generation.

    Attributes
    ----------
    text : str
        The new text, without the prompt, special tokens and the stop string.
    token_ids : list of int
        Every token that was chosen, an ending EOS included.
    finish_reason : str
        "stop" (EOS, a stop token or a stop string), "length" (max_new_tokens, the context or the
        KV cache), "cancelled" or "error".
    stopped_by : str, int or None
        The stop string or token that ended it.
    timings : Timings
        How long it took.
    logprobs : list of TokenLogprobs
        One a token, where they were asked for.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = "length"
    stopped_by: str | int | None = None
    timings: Timings = field(default_factory=Timings)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
