"""A run, given its arguments; fails if that imports code that it does not need, which takes seconds at every start."""

import sys

from dist_trainer.run.configure import load_config
from dist_trainer.run.lifecycle import run

if __name__ == "__main__":
    assert run(load_config(sys.argv[1:])) == 0
    assert not [name for name in sys.modules if name.startswith("transformers.models.llama.modeling")]
    assert "transformers.modeling_utils" not in sys.modules
