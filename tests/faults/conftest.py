"""Most faults are injected into forked runs: what these need is imported once, here, before."""

from tests.distributed.conftest import stories

__all__ = ["stories"]
