"""How a model makes vectors of texts: what its files say and an artifact's manifest keeps."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from amx_tvm.schema import Count, OneOf

POOLINGS = ("cls", "mean", "last")


@dataclass(frozen=True)
class EmbeddingSettings:
    """What surrounds the compiled function.

    Attributes
    ----------
    pooling : str
        Which of the last hidden states make the vector: "cls" (the first), "mean" or "last".
    max_tokens : int
        Tokens of the longest text, prompt and special tokens included.
    include_prompt : bool
        Whether the mean is also over the prompt's tokens.
    normalize : bool
        Vectors have length 1.
    prompts : dict of str to str
        What is put in front of a text, by name.
    default_prompt : str or None
        The name of the prompt that is taken where none is named.
    lower_case : bool
        Texts are made lower case.
    """

    pooling: Annotated[str, OneOf(POOLINGS)]
    max_tokens: Count
    include_prompt: bool = True
    normalize: bool = True
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    lower_case: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the settings as JSON-ready values; `schema.conform` reads them back."""
        return asdict(self)


@dataclass(frozen=True)
class Dense:
    """A linear behind the pooling: sizes, whether it has a bias, and "" or "tanh" behind it."""

    inputs: int
    outputs: int
    bias: bool = False
    activation: str = ""
