"""What a server takes at most, and how it turns the rest away."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds of a server.

    Attributes
    ----------
    queue : int
        Most choices that wait for a place; more are answered with 429.
    queue_tokens : int
        Most prompt tokens that wait.
    kept : int
        How many of the engine's sequences are for ended answers, which stay for prompts that
        begin like them; the others are places.
    body_bytes : int
        Largest body of a request; more is answered with 413.
    timeout_s : float or None
        Longest time that a request may take, from its arrival; None is no limit.
    """

    queue: int = 256
    queue_tokens: int = 1 << 20
    kept: int = 0
    body_bytes: int = 8 << 20
    timeout_s: float | None = None
