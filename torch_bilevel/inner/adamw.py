"""The update of ``torch.optim.AdamW``: Adam with ``decoupled_weight_decay`` set in its groups."""

from __future__ import annotations

import torch

from .adam import adam, adam_stationarity, adam_transpose
from .rule import UpdateRule

ADAMW = UpdateRule(torch.optim.AdamW, adam, adam_stationarity, transpose=adam_transpose)
