"""What a command line that is refused is refused with."""

from __future__ import annotations

import pytest

from dist_trainer.errors import ConfigError
from dist_trainer.run.configure import load_config


def refused(*argv: str) -> str:
    """The message; fails where there is none."""
    with pytest.raises(ConfigError) as caught:
        load_config(argv)
    return str(caught.value)
