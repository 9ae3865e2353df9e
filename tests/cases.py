"""The tables that generate tests: estimators, solvers, update rules, algorithms.

A new member of any registry without a row here fails `test_structure.py`.
"""

import torch

ESTIMATORS = {
    # name: what "exact at the solution" needs (None: not exact there)
    "cg": "cg(max_steps=60, rtol=1e-13)",
    "minres": "minres(max_steps=60, rtol=1e-13)",
    "direct": "direct",
    "richardson": "richardson(max_steps=20000, rtol=1e-13)",
    "neumann": "neumann(num_steps=20000)",
    "identity": None,
    "unrolled": None,
}

SYMMETRIC_ONLY = {"cg", "minres"}

ALGORITHMS = {"AIDBiO": "cg(max_steps=10)", "ITDBiO": "unrolled"}

SGD, ADAM, ADAMW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
ADAM_OPTIONS = [
    {},
    {"weight_decay": 0.1},
    {"amsgrad": True},
    {"maximize": True},
    {"weight_decay": 0.1, "amsgrad": True, "maximize": True},
    {"betas": (0.5, 0.7), "eps": 1e-3},
    {"lr": torch.tensor(0.02, dtype=torch.float64)},
]
RULES = [
    (SGD, {"lr": 0.05, **options})
    for options in [
        {},
        {"weight_decay": 0.1},
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.3},
        {"momentum": 0.9, "nesterov": True},
        {"maximize": True, "momentum": 0.5},
        {"momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1, "maximize": True},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        {"lr": torch.tensor(0.05, dtype=torch.float64), "momentum": 0.9},
    ]
]
RULES += [
    (kind, {"lr": 0.02, **options})
    for kind in (ADAM, ADAMW)
    for options in ADAM_OPTIONS
]
RULES += [(ADAM, {"lr": 0.02, "weight_decay": 0.1, "decoupled_weight_decay": True})]


def rule_id(case):
    kind, options = case
    inside = ",".join(
        f"{k}={v}" for k, v in options.items() if k != "lr" or torch.is_tensor(v)
    )
    return f"{kind.__name__}({inside})"
