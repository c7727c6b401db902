"""Ranks are forked from pytest; what is slow to import is imported once, here, before."""

import pytest
import torch._dynamo  # noqa: F401  DistributedDataParallel imports it: three seconds in each worker otherwise
import transformers  # noqa: F401


@pytest.fixture
def stories(tmp_path_factory):
    """A JSONL file of 40 small documents of real text."""
    import gzip
    import json

    from dist_trainer.data.datasets import CORPUS

    path = tmp_path_factory.getbasetemp() / "stories.jsonl"
    if not path.exists():
        with gzip.open(CORPUS / "austen_train.jsonl.gz", "rt") as file:
            chapters = [json.loads(next(file))["text"] for _ in range(2)]
        text = "".join(chapters)
        parts = [text[start : start + 400] for start in range(0, 16000, 400)]
        path.write_text("".join(json.dumps({"text": part}) + "\n" for part in parts))
    return path
