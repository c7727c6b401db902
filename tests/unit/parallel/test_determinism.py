import os
import subprocess
import sys

import pytest

from dist_trainer.errors import ConfigError
from dist_trainer.parallel.determinism import operations_without_deterministic_kernels_named


def test_an_operation_without_a_deterministic_kernel_is_named():
    said = "adaptive_max_pool2d_backward_cuda does not have a deterministic implementation, but you set 'torch.use_..."
    expected = pytest.raises(ConfigError, match=r"distributed\.reduction: exact, but adaptive_max_pool2d_backward_cuda has no")
    with expected, operations_without_deterministic_kernels_named():
        raise RuntimeError(said)


def test_other_errors_are_left_alone():
    with pytest.raises(RuntimeError, match=r"^out of bounds$"), operations_without_deterministic_kernels_named():
        raise RuntimeError("out of bounds")


def test_torch_is_set_to_deterministic_kernels_without_filling_memory():
    code = """
from dist_trainer.parallel.determinism import use_deterministic_kernels
import os, torch
use_deterministic_kernels()
print(torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory,
      os.environ["CUBLAS_WORKSPACE_CONFIG"])
"""
    environment = {name: value for name, value in os.environ.items() if name != "CUBLAS_WORKSPACE_CONFIG"}
    printed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True).stdout
    assert printed.split() == ["True", "False", ":4096:8"]
