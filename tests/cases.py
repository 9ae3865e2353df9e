"""The tables that generate tests: estimators, solvers, update rules, algorithms.

A new member of any registry without a row here fails `test_structure.py`.
"""

import torch

import torch_bilevel as tb

ESTIMATORS = {
    # name: what "exact at the solution" needs (None: not exact there)
    "cg": "cg(max_steps=60, rtol=1e-13)",
    "minres": "minres(max_steps=60, rtol=1e-13)",
    "direct": "direct",
    "gmres": "gmres(max_steps=60, rtol=1e-13)",
    "cgnr": "cgnr(max_steps=200, rtol=1e-13)",
    "richardson": "richardson(max_steps=20000, rtol=1e-13)",
    "heavy_ball": "heavy_ball(max_steps=20000, rtol=1e-13)",
    "nesterov": "nesterov(max_steps=20000, rtol=1e-13)",
    "neumann": "neumann(num_steps=20000)",
    "identity": None,
    "sample_space": None,  # of the Gauss-Newton matrix; tests/test_engines.py
    "unrolled": None,
    "first_order": None,
    "displacement": None,
    "forward": None,
    "forward_gradient": None,
    "pzobo": None,
    "darts": None,
    "stochastic_neumann": None,
    "random_truncated_neumann": None,
    "stochastic_richardson": None,
    "sgd": None,
    "joint": None,
    "accelerated": None,
}

SYMMETRIC_ONLY = {"cg", "minres", "heavy_ball", "nesterov"}
NEEDS_OUTPUTS = {"sample_space"}  # factors that products="gauss_newton" has
RANDOM = {"random_truncated_neumann"}  # another number every time, even without batches

# estimator, inner steps and further options
ALGORITHMS = {
    "AIDBiO": ("cg(max_steps=10)", 10, {}),
    "ITDBiO": ("unrolled", 10, {}),
    "PZOBO": ("pzobo", 10, {}),
    "AccBiO": ("accbio", 20, {"warm_start": False}),
    "BSGM": ("bsgm", 20, {"warm_start": False}),
    "AmIGO": ("amigo", 10, {}),
    "SRBA": ("srba", 1, {}),
    "DARTS": ("darts", 1, {}),
    "StocBiO": ("stocbio", 10, {}),
    "MRBO": ("mrbo", 1, {}),
    "VRBO": ("vrbo", 10, {}),
    "SID": ("sid", 20, {}),
    "SOBA": ("soba", 1, {}),
    "SABA": ("saba", 1, {}),
    "ProxBiO": ("nesterov(max_steps=10)", 10, {}),
}
# over tasks: estimator and further options
META_ALGORITHMS = {
    "MAML": ("unrolled", {}),
    "FOMAML": ("first_order", {}),
    "ANIL": ("unrolled", {}),
    "MetaSGD": ("unrolled", {}),
    "Reptile": ("displacement", {}),
    "IMAML": ("cg(max_steps=5)", {"proximal_term": 1.0}),
}

CONSTRAINTS = {
    "non_negative": ["non_negative"],
    "box": ["box(lower=-0.5, upper=0.25)", "box(upper=0.5)", "box(lower=-1)"],
    "simplex": ["simplex", "simplex(total=3.0)"],
    "ball": ["ball(radius=1.5)", "ball(radius=1.5, p=1)"],
    "l1": ["l1(weight=0.7)"],
    "group": ["group(weight=0.7, dim=-1)"],
}

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

RMSPROP, ADAGRAD, ADADELTA = (
    torch.optim.RMSprop,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
)
ADAMAX, NADAM, RADAM = torch.optim.Adamax, torch.optim.NAdam, torch.optim.RAdam
ASGD, RPROP, MUON = torch.optim.ASGD, torch.optim.Rprop, torch.optim.Muon
ADAFACTOR = torch.optim.Adafactor
DECAYED = {"weight_decay": 0.1, "maximize": True}
DECOUPLED = {"weight_decay": 0.1, "decoupled_weight_decay": True}
BETAS = {"betas": (0.5, 0.7), "eps": 1e-3}
TENSOR = {"lr": torch.tensor(0.03, dtype=torch.float64)}
OTHERS = {
    RMSPROP: [
        {},
        {"weight_decay": 0.1},
        {"centered": True, "eps": 1e-3},
        {"momentum": 0.9, "alpha": 0.7},
        {"momentum": 0.5, "centered": True, "alpha": 0.7, **DECAYED},
        {"momentum": 0.5, **TENSOR},
    ],
    ADAGRAD: [
        {},
        {"weight_decay": 0.1},
        {"lr_decay": 0.3},
        {"initial_accumulator_value": 0.5, "eps": 1e-3},
        {"lr_decay": 0.3, "initial_accumulator_value": 0.1, **DECAYED},
        {"lr_decay": 0.3, **TENSOR},
    ],
    ADADELTA: [
        {"lr": 1.0},
        {"lr": 1.0, "weight_decay": 0.1},
        {"lr": 0.5, "rho": 0.6, "eps": 1e-3},
        {"lr": 0.5, "rho": 0.6, "eps": 1e-3, **DECAYED},
        {"eps": 1e-3, **TENSOR},
    ],
    ADAMAX: [{}, {"weight_decay": 0.1}, BETAS, {**BETAS, **DECAYED}, TENSOR],
    NADAM: [
        {},
        {"weight_decay": 0.1},
        DECOUPLED,
        {"momentum_decay": 0.3},
        {"momentum_decay": 0.0, **BETAS, **DECAYED},
        {"maximize": True, **DECOUPLED, **BETAS},
        TENSOR,
    ],
    # ρₜ > 5 from step 6 on, with the last row's betas never
    RADAM: [
        {},
        {"weight_decay": 0.1},
        DECOUPLED,
        {"betas": (0.5, 0.99), "eps": 1e-3, **DECAYED},
        {"maximize": True, **DECOUPLED},
        TENSOR,
        {**BETAS, "betas": (0.5, 0.6), **DECOUPLED},
    ],
    ASGD: [
        {},
        {"weight_decay": 0.1},
        {"lambd": 0.2, "alpha": 0.6, "t0": 1},
        {"lambd": 0.2, "t0": 2, **DECAYED},
        {"lambd": 0.2, "t0": 0, **TENSOR},
    ],
    RPROP: [
        {},
        {"etas": (0.3, 1.4), "maximize": True},
        {"step_sizes": (0.015, 0.025)},
        TENSOR,
    ],
    # RMS(y) is above and below ε₂, RMS(u) above and below d
    ADAFACTOR: [
        {"lr": 0.2},
        {"lr": 0.9, "weight_decay": 0.1},
        {"lr": 0.2, "beta2_decay": -0.3, "eps": (1e-3, 3.0), "d": 1.5},
        {"maximize": True, "weight_decay": 0.1},
        TENSOR,
    ],
    MUON: [
        {},
        {"weight_decay": 0.0, "nesterov": False},
        {"momentum": 0.5, "adjust_lr_fn": "match_rms_adamw"},
        {"ns_steps": 3, "ns_coefficients": (1.5, -0.5, 0.0), "eps": 1e-3},
        {"adjust_lr_fn": "original", **TENSOR},
    ],
}
RULES += [
    (kind, {"lr": 0.02, **options})
    for kind, table in OTHERS.items()
    for options in table
]
RULES += [(tb.FixedPointIteration, {"damping": 0.05})]


def rule_id(case):
    kind, options = case
    inside = ",".join(
        f"{k}={v}" for k, v in options.items() if k != "lr" or torch.is_tensor(v)
    )
    return f"{kind.__name__}({inside})"
