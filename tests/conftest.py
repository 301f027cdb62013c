"""Property tests draw the same examples in every run, so that a change is what turns one red."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")
