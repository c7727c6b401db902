"""What profile.steps may say."""

from __future__ import annotations

import re

from dist_trainer.errors import ConfigError

MOST_PROFILED_STEPS = 50
"""Each is some megabytes of trace and held in memory until the last: a few tell as much."""


def parse_profile_steps(text: str) -> range:
    """The steps, counted from 1, that "5" or "5-8" (the last one included) means. Raises ConfigError with the remedy."""
    match = re.fullmatch(r"\s*([1-9]\d*)\s*(?:-\s*([1-9]\d*)\s*)?", text, re.ASCII)
    if match is None or len(text) > 40:
        raise ConfigError(f"profile.steps: {text!r} is neither a step such as 5 nor a range of steps such as 5-8")
    first, last = int(match[1]), int(match[2] or match[1])
    if last < first:
        raise ConfigError(f"profile.steps: {text!r} ends before it begins; write {last}-{first}")
    if last - first >= MOST_PROFILED_STEPS:
        most = f"{first}-{first + MOST_PROFILED_STEPS - 1}"
        raise ConfigError(f"profile.steps: {text!r} are {last - first + 1} steps, too many for a trace; at most {most}")
    return range(first, last + 1)
