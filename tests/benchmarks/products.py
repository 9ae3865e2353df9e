"""Second-order products and hypergradients, in gradients and beside other packages.

    products       one product H v, and (H v, J v), at a fixed point; in gradients of the same loss
    hypergradient  data cleaning with ten steps of CG; in times of hand-written formulas
    oracle         (g, ∇g, H v, J v) at a fresh batch, nothing kept; in gradients
    heads          one product for 32 few-shot heads; in times of a loop over them
    solver         aten operations and host synchronisations of a CG step besides its product
    memory         growth of the peak resident set by one hypergradient, a process each, MiB

Competitors of a row take turns in random order, each repeated until it takes 5 ms; figures are
ratios of medians over the rounds. Before that every result is compared with the first one's.

    python tests/benchmarks/products.py [--problem products/softmax heads] [--quick]
        [--rounds 30] [--threads 2] [--compile] [--data DIR] [--json FILE] [--output FILE]
"""

import argparse
import functools
import gc
import gzip
import importlib
import json
import math
import os
import random
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import baselines as base
import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import torch_bilevel as tb
from torch_bilevel import ops
from torch_bilevel.solvers import Operator

STEPS = 10  # of conjugate gradients
EXACT = 1e-3  # how far results may differ, relative to the norm of the first
ENGINES = {
    # name: whether it gives H itself, up to rounding
    "double_backward": True,
    "traced": True,
    "traced(compile=True)": True,
    "forward_over_reverse": True,
    "gauss_newton": False,
    "finite_difference": False,
}


@dataclass
class Row:
    """What was found on one problem; values are ratios, counts or MiB."""

    name: str
    unit: str
    values: dict[str, float] = field(default_factory=dict)
    milliseconds: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


class Contest:
    """Competitors on one problem; the first one added is the unit.

    Args:
        row: where results go.
        cuts: positions at which results split into pieces that are compared one by one.
    """

    def __init__(self, row, *cuts):
        self.row, self.cuts = row, cuts
        self.functions, self.expected = {}, {}

    def add(self, name, build, like=None, exact=True):
        """Enter ``build()``, a function whose result must be that of ``like``, if given.

        Raises:
            AssertionError: it gives something else.
        """
        try:
            function = build()
            found = base.flat(function()).clone()
        except Exception as error:  # a peer not installed, an engine that refuses
            self.row.skipped[name] = reason(error)
            return
        if like is not None:
            error = self.row.errors[name] = self.difference(found, like)
            assert error < EXACT or not exact, (
                f"{self.row.name}, {name}: off by {error:.1e}"
            )
        self.functions[name], self.expected[name] = function, found

    def add_all(self, builders, like, *args):
        """Enter several, each made by ``build(*args)``."""
        for name, build in builders.items():
            self.add(name, partial(build, *args), like)

    def difference(self, found, like):
        """The largest relative error of a piece."""
        pairs = zip(
            torch.tensor_split(found, self.cuts),
            torch.tensor_split(self.expected[like], self.cuts),
            strict=True,
        )
        return max(float((a - b).norm() / b.norm()) for a, b in pairs if len(b))

    def run(self, rounds, least):
        """Time everything; ``least`` is the shortest measurement, seconds."""
        gc.collect()
        repeats, times = {}, {name: [] for name in self.functions}
        for name, function in self.functions.items():
            measure(function, 1)
            repeats[name] = max(1, math.ceil(least / measure(function, 2)))
        shuffle = random.Random(0)  # the global generator stands still
        for _ in range(rounds):
            for name in shuffle.sample(list(times), len(times)):
                times[name].append(measure(self.functions[name], repeats[name]))
        medians = {name: statistics.median(values) for name, values in times.items()}
        unit = next(iter(medians.values()))
        self.row.milliseconds = {name: 1e3 * value for name, value in medians.items()}
        self.row.values = {name: value / unit for name, value in medians.items()}


def measure(function, repeats):
    """Seconds a call."""
    began = time.perf_counter()
    for _ in range(repeats):
        function()
    return (time.perf_counter() - began) / repeats


def reason(error):
    """Why somebody does not take part, in a line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"


# --- the library ----------------------------------------------------------------------


def recorded(case, engine="double_backward", estimator="cg"):
    """A `BilevelOptimizer` that has seen one inner step, of no length, on the batch."""
    optimizer = tb.BilevelOptimizer(
        torch.optim.SGD(case.params, lr=0.0, weight_decay=case.decay),
        torch.optim.SGD([case.weights], lr=0.1),
        modules=case.model,
        estimator=estimator,
        products=engine,
    )
    train_loss = optimizer.inner_loss(case.loss)
    optimizer.outer_loss(case.valid_loss)
    optimizer.zero_grad()
    train_loss(*case.batch).backward()
    optimizer.step()
    return optimizer


def linearized(optimizer):
    """The products of its engine at the recorded step."""
    calls = optimizer._recorder.window.steps()[-1].calls
    return optimizer.products.linearize(optimizer.problem, calls)


def recorded_by_all(row, cases, names):
    """Every engine's optimizer on every case: all step before anybody linearises.

    Returns:
        Name → (engine, optimizer).
    """
    found = {}
    for prefix, case in cases.items():
        for name in names:
            try:
                found[prefix + name] = name, recorded(case, name)
            except Exception as error:
                row.skipped[prefix + name] = reason(error)
    return found


def add_engine(contest, name, engine, optimizer, v):
    """H v and (H v, J v), from one linearisation."""
    at = functools.cache(lambda: linearized(optimizer))
    for kind, suffix in (("hvp", ""), ("joint", ", joint")):
        build = lambda kind=kind: partial(getattr(at(), kind), v)  # noqa: E731
        contest.add(name + suffix, build, "raw" + suffix, ENGINES[engine])


def ours(case, steps, engine="double_backward"):
    """The hypergradient as a user asks for it."""
    estimator = f"cg(max_steps={steps}, rtol=0.0, warm_start=False)"
    optimizer = recorded(case, engine, estimator)
    return lambda: optimizer.hypergradient(*case.valid, write=False)


def joint_ours(case, v):
    """(g, ∇g, H v, J v) at a fresh batch, along a v that is known before, as SOBA takes it."""
    case, seen = with_ops(case), []
    evaluate = case.loss

    def loss(*batch):
        value = evaluate(*batch)
        seen[:] = [value.detach()]
        return value

    case.loss = loss
    optimizer = recorded(case)
    problem = optimizer.problem
    calls = optimizer._recorder.window.steps()[-1].calls

    def oracle():
        parts = problem.inner.layout.split(v)
        with ops.foreseen(problem.inner.tensors, parts):
            at = problem.linearize(calls)
        return seen[0], at.gradient, at.joint(v)

    return oracle


def with_ops(case):
    """The same case with the library's fused loss of a linear model."""
    return replace(case, fused=ops)


# --- sections -------------------------------------------------------------------------


def products(row, args, kind, n):
    """One product at a fixed point; the unit is one gradient of the unfused loss."""
    case = base.make_case(kind, n)
    contest, v, cases = Contest(row, case.size), vector(case), {"": case}
    if kind == "softmax":
        cases["ops: "] = with_ops(case)
    names = [name for name in ENGINES if args.compile or "compile" not in name]
    engines = recorded_by_all(row, cases, names)
    for prefix, each in cases.items():
        contest.add(prefix + "gradient", partial(base.gradient, each))
        for suffix, joint in (("", False), (", joint", True)):
            like = "raw" + suffix if prefix else None
            build = partial(base.raw, each, v, joint)
            contest.add(prefix + "raw" + suffix, build, like)
    for name, (engine, optimizer) in engines.items():
        add_engine(contest, name, engine, optimizer, v)
    others = {"jvp(grad)": base.functional}
    others |= {"formulas": base.formulas} if kind == "softmax" else {}
    contest.add_all(others, "raw", case, v)
    joint = {f"{name}, joint": build for name, build in others.items()}
    contest.add_all(joint, "raw, joint", case, v, True)
    # not exact: torch's jvp(jacrev) is wrong by 2e-3 on the transformer, in float64 too
    contest.add("curvlinops", partial(base.curvlinops, case, v), "raw", exact=False)
    contest.run(args.rounds, args.least)


def vector(case):
    """The v of a product."""
    return torch.randn(case.size, generator=torch.Generator().manual_seed(1))


def hypergradient(row, args, n):
    """Ten steps of CG for data cleaning, validation on as many examples."""
    case = base.make_case("softmax", n, decay=1e-3)
    if args.data:
        case.batch, case.valid = mnist(args.data, n, case.batch[1])
    train = torch.optim.SGD(case.params, lr=0.1, momentum=0.9, weight_decay=case.decay)
    for _ in range(50):
        train.zero_grad()
        case.loss(*case.batch).backward(inputs=case.params)
        train.step()
    contest = Contest(row)
    contest.add("formulas", partial(base.formula_hypergradient, case, STEPS))
    competitors = {
        "kept graph, by hand": base.graph_hypergradient,
        "ours": ours,
        "ours, ops": lambda case, steps: ours(with_ops(case), steps),
        "ours, traced": partial(ours, engine="traced"),
        "ours, ops, traced": lambda case, n: ours(with_ops(case), n, "traced"),
        "TorchOpt": base.torchopt_hypergradient,
        "hypertorch's CG": base.hypertorch_hypergradient,
        "jvp(grad)": base.functional_hypergradient,
    }
    contest.add_all(competitors, "formulas", case, STEPS)
    contest.run(args.rounds, args.least)


def mnist(folder, n, noisy):
    """n training images with 40 % wrong labels and n of validation, from idx files."""
    raw = gzip.open(Path(folder) / "train-images-idx3-ubyte.gz").read(16 + 2 * n * 784)
    x = torch.tensor(np.frombuffer(raw, np.uint8, offset=16).reshape(-1, 784) / 255.0)
    raw = gzip.open(Path(folder) / "train-labels-idx1-ubyte.gz").read(8 + 2 * n)
    y = torch.tensor(np.frombuffer(raw, np.uint8, offset=8).astype(np.int64))
    given = torch.where(torch.rand(n) < 0.4, noisy, y[:n])
    return (x[:n].float(), given), (x[n:].float(), y[n:])


def oracle(row, args, n):
    """Loss, gradient, H v and J v at a fresh batch; the unit is one gradient."""
    case = base.make_case("softmax", n)
    contest = Contest(row, 1, 1 + case.size, 1 + 2 * case.size)
    contest.add("gradient", partial(base.gradient, case))
    contest.add("three calls", partial(base.oracle_separate, case, vector(case)))
    competitors = {
        "one graph": base.oracle_shared,
        "ours": joint_ours,
        "formulas": base.oracle_formulas,
    }
    contest.add_all(competitors, "three calls", case, vector(case))
    contest.run(args.rounds, args.least)


def heads(row, args):
    """One product for all of 32 heads, 25 × 512 features, 5-way; the unit is the loop."""
    problem, contest = base.Heads(), Contest(row)
    contest.add("loop of graphs", problem.loop)
    competitors = {
        "vmap(jvp(grad))": problem.mapped_jvp,
        "graph of vmap(loss).sum()": problem.one_graph,
        "graph of vmap(ops).sum()": problem.fused,
        "ours: vmap(loss).sum(), traced": partial(heads_ours, problem, False),
        "ours: vmap(ops).sum(), traced": partial(heads_ours, problem, True),
        "bmm formula": problem.explicit,
    }
    contest.add_all(competitors, "loop of graphs")
    contest.run(args.rounds, args.least)


def heads_ours(problem, fused):
    """All heads are one inner variable, their losses one inner loss."""
    heads = problem.heads.detach().clone().requires_grad_()
    weights = torch.zeros(len(heads), requires_grad=True)
    optimizer = tb.BilevelOptimizer(
        torch.optim.SGD([heads], lr=0.0),
        torch.optim.SGD([weights], lr=0.1),
        products="traced",
    )

    def one(head, x, y, weight):
        if fused:
            return weight.exp() * ops.linear_cross_entropy(x, head, None, y)
        return weight.exp() * F.cross_entropy(F.linear(x, head), y)

    @optimizer.inner_loss
    def train_loss(x, y):
        return torch.vmap(one)(heads, x, y, weights).sum()

    train_loss(problem.x, problem.y).backward()
    optimizer.step()
    return partial(linearized(optimizer).hvp, problem.v.reshape(-1))


class Counter(TorchDispatchMode):
    """Counts aten operations: all, those that run over vectors, host synchronisations."""

    HOST = ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal")

    def of(self, solve, steps):
        """What a solve of so many steps issues, its products excepted."""
        self.counts, self.paused = {"aten": 0, "vector": 0, "sync": 0}, False
        with self:
            solve(steps)
        return self.counts

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not self.paused:
            tensors = filter(torch.is_tensor, tree_leaves((args, result)))
            kinds = [r.alias_info for r in func._schema.returns]
            view = any(kind and not kind.is_write for kind in kinds)
            self.counts["aten"] += 1
            self.counts["vector"] += not view and any(t.numel() > 16 for t in tensors)
            self.counts["sync"] += func._schema.name in self.HOST
        return result


def solver(row, args):
    """One step of CG at 28 tensors (14 layers 64 × 64), besides its product."""
    shapes = [(64, 64), (64,)] * 14
    sizes, counter = [math.prod(shape) for shape in shapes], Counter()
    diagonal = 1 + torch.rand(sum(sizes))
    parts = [a.view(s) for a, s in zip(diagonal.split(sizes), shapes, strict=True)]

    def apply(p):  # diagonal · p, of whatever p is
        counter.paused = True
        many = isinstance(p, list | tuple)
        pairs = zip(parts, p, strict=True) if many else [(diagonal.to(p.device), p)]
        found = [a * b for a, b in pairs]
        counter.paused = False
        return found if many else found[0]

    def flat(device, steps):
        b = torch.ones(sum(sizes), device=device)
        tb.CG(max_steps=steps, rtol=0.0).solve(Operator(apply, len(b)), b)

    def torchopt(steps):
        cg = importlib.import_module("torchopt").linalg.cg
        cg(apply, list(map(torch.ones, shapes)), rtol=0.0, maxiter=steps)

    for name, solve in {
        "ours, on the CPU": partial(flat, "cpu"),
        "ours, with masks": partial(flat, "meta"),  # no data: it cannot synchronise
        "hypertorch's CG": partial(base.list_cg, apply, list(map(torch.ones, shapes))),
        "TorchOpt": torchopt,
    }.items():
        try:
            more, less = counter.of(solve, 5), counter.of(solve, 4)
        except ImportError as error:
            row.skipped[name] = reason(error)
            continue
        for kind in more:
            row.values[f"{name}: {kind}"] = more[kind] - less[kind]


METHODS = {
    "gradient": lambda case, steps: base.gradient(case),
    "kept graph, by hand": base.graph_hypergradient,
    "ours": ours,
    "jvp(grad)": base.functional_hypergradient,
}


def memory(row, args, kind, n):
    """Peak growth, each method in a process of its own."""
    for method in METHODS:
        command = [sys.executable, __file__, "--one", method, kind, str(n)]
        command += ["--threads", str(args.threads)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            row.skipped[method] = done.stderr.strip().splitlines()[-1]
        else:
            row.values[method] = float(done.stdout)


def one(method, kind, n):
    """Print the growth of the peak resident set by one hypergradient, MiB.

    The decay keeps CG among positive curvatures, so that everybody makes all steps.
    """
    case = base.make_case(kind, int(n), decay=100.0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now
    before = peak()
    METHODS[method](case, STEPS)()
    print(peak() - before)


def peak():
    """The peak resident set, MiB; ``ru_maxrss`` would include the parent's."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


GRADIENT, FORMULAS = "gradients", "hand-written formulas"
ROWS = {
    # name: (what a value is in, section, its arguments)
    "products/softmax-64": (GRADIENT, products, "softmax", 64),
    "products/softmax-1024": (GRADIENT, products, "softmax", 1024),
    "products/softmax-5000": (GRADIENT, products, "softmax", 5000),
    "products/mlp-1024": (GRADIENT, products, "mlp", 1024),
    "products/convnet-64": (GRADIENT, products, "convnet", 64),
    "products/transformer-16": (GRADIENT, products, "transformer", 16),
    "hypergradient/500": (FORMULAS, hypergradient, 500),
    "hypergradient/5000": (FORMULAS, hypergradient, 5000),
    "oracle/64": (GRADIENT, oracle, 64),
    "oracle/1024": (GRADIENT, oracle, 1024),
    "oracle/5000": (GRADIENT, oracle, 5000),
    "heads/32": ("loops of graphs", heads),
    "solver/28-tensors": ("operations a step", solver),
    "memory/transformer-128": ("MiB", memory, "transformer", 128),
    "memory/convnet-512": ("MiB", memory, "convnet", 512),
}


def table(rows):
    """Rows of one section as Markdown: a column for each problem."""
    names = list(dict.fromkeys(name for row in rows for name in row.values))
    heads = [f"{row.name.split('/')[1]}" for row in rows]
    lines = [f"| in {rows[0].unit} | " + " | ".join(heads) + " |"]
    lines.append("|---" * (len(rows) + 1) + "|")
    for name in names:
        cells = [cell(row, name) for row in rows]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(row, name):
    """A value; the unit with its milliseconds, and what is not exact with its error."""
    if name not in row.values:
        return "–"
    text = f"{row.values[name]:.2f}" if row.milliseconds else f"{row.values[name]:.0f}"
    if name == next(iter(row.milliseconds), None):
        text += f" ({row.milliseconds[name]:.2f} ms)"
    error = row.errors.get(name, 0.0)
    return text + (f" (off by {error:.0e})" if error > 1e-4 else "")


def draw(path, sections):
    """A panel of bars for each section."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    wide = min(len(sections), 3)
    high = math.ceil(len(sections) / wide)
    figure, panels = plt.subplots(
        high, wide, figsize=(6 * wide, 6 * high), layout="constrained", squeeze=False
    )
    for axes in panels.flat[len(sections) :]:
        axes.remove()
    for axes, (title, rows) in zip(panels.flat, sections.items(), strict=False):
        names, height = list(rows[0].values), 0.8 / len(rows)
        for index, row in enumerate(rows):
            values = [row.values.get(name, math.nan) for name in names]
            places = [place + index * height for place in range(len(names))]
            axes.barh(places, values, height, label=row.name.split("/")[1])
        axes.set_yticks([k + 0.4 - height / 2 for k in range(len(names))], names)
        axes.invert_yaxis()
        if rows[0].milliseconds:
            axes.set_xscale("log")
            axes.axvline(1, color="black", linewidth=0.8)
        axes.set(title=title, xlabel=rows[0].unit)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problem", nargs="+", default=[""], help="parts of names")
    parser.add_argument(
        "--rounds", type=int, default=None, help="30, or 3 with --quick"
    )
    parser.add_argument("--quick", action="store_true", help="rough figures")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="also inductor")
    parser.add_argument("--data", metavar="DIR", help="MNIST idx files, for cleaning")
    parser.add_argument("--output", metavar="FILE", help="a figure")
    parser.add_argument("--json", metavar="FILE", help="every number")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.rounds = args.rounds or (3 if args.quick else 30)
    args.least = 1e-3 if args.quick else 5e-3
    return args


def main():
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    if args.one:
        return one(*args.one)
    chosen = [
        name
        for name in ROWS
        if any(
            part == name or part not in ROWS and part in name for part in args.problem
        )
    ]
    print(
        f"torch {torch.__version__}, {args.threads} threads, {args.rounds} rounds, "
        f"load {os.getloadavg()[0]:.1f} (a busy core spoils ratios of two threads)"
    )
    sections = {}
    for name in chosen:
        unit, section, *options = ROWS[name]
        row = Row(name, unit)
        section(row, args, *options)
        sections.setdefault(name.split("/")[0], []).append(row)
        for competitor, reason in row.skipped.items():
            print(f"{name}: {competitor} skipped ({reason})", file=sys.stderr)
    for title, rows in sections.items():
        print(f"\n**{title}**\n\n{table(rows)}")
    if args.json:
        found = [asdict(row) for rows in sections.values() for row in rows]
        Path(args.json).write_text(json.dumps(found, indent=1))
    if args.output:
        draw(args.output, sections)


if __name__ == "__main__":
    with sdpa_kernel(SDPBackend.MATH):  # the other kernels have no second derivative
        main()
