"""Tests run in float64, seeded, with warnings as errors."""

import os
import random

import numpy as np
import pytest
import torch
from hypothesis import settings

if (
    not torch.cuda.is_available()
):  # kernels run in Triton's interpreter; before they are imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile(
    "repeatable", deadline=None, derandomize=True, max_examples=25
)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def float64_and_seeded(request):
    if "torch_bilevel" in str(request.node.path.parent):  # doctests are what users see
        yield
        return
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_default_dtype(torch.float32)
