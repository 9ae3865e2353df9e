"""Kernels, captured products and solves on a CUDA device: are they right, and how fast.

    roofline     bandwidths, matrix products, launches; always, and first
    correctness  kernels beside float64 references, whether bits repeat; captured hypergradients
    tuning       first use of every kernel: seconds, and the configuration chosen
    products     H v of softmax regression and of a transformer
    oracle       (g, ∇g, H v, J v) of softmax regression at a fresh batch
    solver       20 steps of conjugate gradients for an MLP, and how often the host waits
    heads        10 steps for 256 few-shot heads
    vectors      what a step of a solver does besides its product, 10 M parameters

Times are device events around so many calls that they take 5 ms; competitors take turns in random
order; medians over rounds. *Cold*: calls rotate through copies, together three times the
second-level cache. *Warm*: one copy. The first competitor is the unit, and the others' results are
compared with its own before anything is timed. *Roofline*: the bytes that must move, at the
bandwidth of a copy, over the time taken.

Everything is saved as soon as it is known; an error that breaks the device is noted, and a new
process goes on behind it. ``--dry`` runs every path on a CPU, in Triton's interpreter, at tiny
sizes: its figures mean nothing.

    python tests/benchmarks/gpu.py --cuda [--parts products oracle] [--rounds 30] [--seconds 560]
        [--data DIR] [--json FILE] [--output FILE] [--figure FILE]
    python tests/benchmarks/gpu.py --dry
"""

import argparse
import contextlib
import copy
import datetime
import gc
import importlib.metadata
import itertools
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

os.environ["TRITON_INTERPRET"] = str(int("--dry" in sys.argv))  # before any kernel
os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # JAX leaves memory to others
sys.path.append(str(Path(__file__).parents[1]))

import baselines as base
import numpy as np
import products
import test_kernels as kernels
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

import torch_bilevel as tb
from torch_bilevel import ops
from torch_bilevel.kernels import cg_step, head_cg, joint, one_pass, richardson_step
from torch_bilevel.kernels.one_pass import Direction
from torch_bilevel.ops import fused
from torch_bilevel.ops.linear_cross_entropy import _Indices
from torch_bilevel.solvers import Memory, Operator, capture, cg

DRY = "--dry" in sys.argv
DEVICE = torch.device("cpu" if DRY else "cuda")
FIRST = "kept graph (cached double backward)"
EXACT = 1e-3  # how far results may differ, relative to the norm of the first
KINDS = ("cold", "warm")
KERNELS = ("rows", "two_pass", "one_pass")
VISITS = KERNELS[1:]  # that read x themselves
CLASSES = 10
LOSSES = [name for name in ops.__all__ if not name.startswith("solve")]


def size(real, dry):
    """A size, or a tiny one."""
    return dry if DRY else real


SIZES = size((60000, 1024, 5000), (20,))


# --- what was found -------------------------------------------------------------------


class Session:
    """What was found, item by item: ``found`` is what is saved."""

    def __init__(self, args):
        self.args, self.path, self.deadlines = args, Path(args.json), {}
        self.began, self.found = args.resume or time.time(), {"items": {}, "broke": {}}
        if args.resume:
            self.found = json.loads(self.path.read_text())
        self.found["environment"] = environment()

    def item(self, part, seconds, name, find, *args):
        """Note what ``find(self, *args)`` gives, or why it gives nothing."""
        last = min(time.time() + seconds, self.began + self.args.seconds)
        self.deadline = self.deadlines.setdefault(part, last)
        self.name = f"{part}/{name}"
        if self.name in self.found["items"]:
            return
        try:
            found = {"failed": "out of time"} if self.late else find(self, *args)
        except Exception as error:
            found = {"failed": products.reason(error)}
        self.found["items"][self.name] = found
        print(described(self.name, found, self.bandwidth), flush=True)
        gc.collect()
        self.save()

    def save(self, guilty=None, why=None):
        """Write everything; where the device is broken, start anew without who broke it."""
        broken = is_broken()
        if broken and guilty:
            self.found["broke"][f"{self.name}: {guilty}"] = f"broke the device: {why}"
        self.path.write_text(json.dumps(self.found, indent=1))
        if broken:
            print("an error broke the device: a new process goes on", flush=True)
            more = [f"--resume={self.began}", f"--json={self.path}"]
            os.execv(sys.executable, [sys.executable, *sys.argv, *more])

    @property
    def late(self):
        """Whether the part's time is up."""
        return time.time() > self.deadline

    @property
    def bandwidth(self):
        """Of a copy, bytes a second; NaN where it is not known."""
        known = self.found["items"].get("roofline/device", {})
        return known.get("copy, GB/s", math.nan) * 1e9


def is_broken():
    """Whether nothing runs on the device any more; waits for what runs."""
    try:
        return torch.ones((), device=DEVICE).item() != 1
    except RuntimeError:
        return True


def environment():
    """What figures depend on."""
    found = {"date": datetime.date.today().isoformat(), "dry": DRY, "device": "CPU"}
    for name in "torch triton numpy jax torchopt curvlinops-for-pytorch".split():
        with contextlib.suppress(ImportError):
            found[name] = importlib.metadata.version(name)
    if not DRY:
        found |= {"device": torch.cuda.get_device_name(), "CUDA": torch.version.cuda}
        found["cache, MB"] = cache_bytes() / 1e6
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        with contextlib.suppress(OSError):
            done = subprocess.run(query, capture_output=True, text=True, check=False)
            found["driver"] = done.stdout.strip()
    return found


# --- timing ---------------------------------------------------------------------------


def by_events(calls, count):
    """Seconds a call, by events of the device; on a CPU by the clock."""
    if DRY:
        return by_clock(calls, count)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(count):
        next(calls)()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / count


def by_clock(calls, count):
    """Seconds a call, by the clock of the host, which waits for what JAX has launched."""
    began = time.perf_counter()
    for _ in range(count):
        last = next(calls)()
    for leaf in tree_leaves(last):
        getattr(leaf, "block_until_ready", int)()
    return (time.perf_counter() - began) / count


def replayed(run):
    """A function that replays ``run`` as a CUDA graph; on a CPU, ``run`` itself."""
    run, found = torch.no_grad()(run), []
    if DRY:
        return run
    graph = capture(lambda: found.append(run()), DEVICE, "run")

    def replay():
        graph.replay()
        return found[-1]

    replay.reads = run  # what the graph reads stays alive
    return replay


def cache_bytes():
    """Of the second level; in a dry run so few that everything outgrows it."""
    known = None if DRY else torch.cuda.get_device_properties(DEVICE)
    return 1 if DRY else getattr(known, "L2_cache_size", 60e6)


def cold(nbytes):
    """How many copies of so many bytes are three times the second-level cache."""
    return 2 if DRY else max(1, math.ceil(3 * cache_bytes() / nbytes))


class Race:
    """Competitors on one problem; the first one added is the unit.

    Args:
        session: where it belongs.
        copies: of the problem, each the arguments of what builds a competitor.
        moved: bytes that have to move.
        targets: competitor → microseconds.
        cuts: positions at which results split into pieces that are compared one by one.
    """

    def __init__(self, session, copies, moved=0, targets=(), cuts=()):
        self.session, self.copies, self.cuts = session, copies, cuts
        self.found = {"rows": {}, "moved": moved, "targets": dict(targets)}
        self.entered, self.expected = {}, None

    def add(self, name, build, single=False, timer=by_events, per=1):
        """Enter what ``build(*copy)`` gives for each copy, or only for the first.

        Args:
            per: how often a call does the work; what it gives first is compared.
        """
        row = self.found["rows"][name] = {}
        known = self.session.found["broke"].get(f"{self.session.name}: {name}")
        if known or self.session.late:
            row["note"] = known or "out of time"
            return
        try:
            functions = [build(*c) for c in self.copies[: 1 if single else None]]
            pieces = [self.pieces(function()) for function in functions][-1]
            self.expected = self.expected or pieces
            row["off"] = off(pieces, self.expected)
        except Exception as error:
            missing = isinstance(error, ModuleNotFoundError) and f"no {error.name}"
            row["note"] = missing or products.reason(error)
            self.session.save(name, row["note"])
            return
        if row["off"] < EXACT:
            self.entered[name] = timer, functions, per
        else:
            row["note"] = "wrong, and not timed"

    def add_jax(self, name, peer, *args, per=1, **options):
        """Enter a competitor of ``jax_peers.py``, timed by the clock of the host."""
        options |= {"per": per} if per > 1 else {}
        build = in_jax(peer, *args, **options)
        self.add(name, build, timer=by_clock, per=per)

    def pieces(self, result):
        """What is compared; JAX's arrays too."""
        leaves = [leaf for leaf in tree_leaves(result) if hasattr(leaf, "shape")]
        known = [a if torch.is_tensor(a) else torch.tensor(np.array(a)) for a in leaves]
        flat = [a.detach().to(DEVICE).double().reshape(-1) for a in known]
        flat, size = torch.cat(flat), sum(len(part) for part in self.expected or ())
        return torch.tensor_split(flat[: size or None], self.cuts)

    def run(self):
        """Time everything; microseconds a call."""
        series, big = {}, self.found["moved"] > 3 * cache_bytes()
        big = big and len(self.copies) == 1
        for name, (timer, functions, _) in self.entered.items():
            if big or len(functions) > 1:
                series[name, "cold"] = timer, itertools.cycle(functions)
            if not big:
                series[name, "warm"] = timer, itertools.cycle(functions[:1])
        counts, times = {}, {key: [] for key in series}
        for key, (timer, calls) in series.items():
            each = timer(calls, size(3, 1))
            counts[key] = min(1000, max(1, math.ceil(size(5e-3, 0) / each)))
        shuffle = random.Random(0)  # the global generator stands still
        for number in range(self.session.args.rounds):
            if number >= 3 and self.session.late:
                break
            for key in shuffle.sample(list(series), len(series)):
                times[key].append(series[key][0](series[key][1], counts[key]))
        for (name, kind), values in times.items():
            each = statistics.median(values) / self.entered[name][-1]
            self.found["rows"][name][kind] = 1e6 * each
        return self.found


def off(found, exact):
    """The largest relative error of a piece, NaN if there is any."""
    pairs = [(a.double(), b.double()) for a, b in zip(found, exact, strict=True)]
    errors = [float((a - b).norm() / b.norm()) for a, b in pairs]
    return max(errors, key=lambda error: (math.isnan(error), error))


# --- roofline, correctness, tuning ----------------------------------------------------


def measured(session):
    """Bandwidths, rates and launches; medians, warm."""

    def seconds(call, count=1):
        by_events(itertools.repeat(call), 3)
        found = [by_events(itertools.repeat(call), count) for _ in range(size(20, 1))]
        return statistics.median(found)

    n, side, launches = size(2**28, 2**12), size(8192, 32), size(1000, 3)
    a, b = (torch.ones(n, device=DEVICE) for _ in range(2))
    found = {"copy, GB/s": 8e-9 * n / seconds(lambda: b.copy_(a))}
    found["read (a sum), GB/s"] = 4e-9 * n / seconds(a.sum)
    a, b = (torch.randn(side, side, device=DEVICE) for _ in range(2))
    for name, precision in (("TF32", "tf32"), ("float32", "ieee")):
        torch.backends.cuda.matmul.fp32_precision = precision
        flops = 2 * side**3 / seconds(lambda: a @ b)
        found[f"{name} product, TFLOP/s"] = 1e-12 * flops
    add = partial(torch.zeros(1, device=DEVICE).add_, 1)
    many = replayed(lambda: [add() for _ in range(launches)][-1])
    found["launch, µs"] = 1e6 * seconds(add, launches)
    found["node of a graph, µs"] = 1e6 * seconds(many) / launches
    found["replay of a graph, µs"] = 1e6 * seconds(replayed(add), launches)
    return found


def compared(session, make, bar, runs=None):
    """The error of a result, and whether many runs have the same bits.

    Autotuned kernels take their first configuration, and new memory is full of NaN.
    """
    (found, exact), runs = make(), size(100, 1) if runs is None else runs
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        first = [part.clone() for part in kernels.flat(found())]
        same = all(kernels.same(found(), first) for _ in range(runs))
    finally:
        torch.use_deterministic_algorithms(False)
    error = off(first, kernels.flat(exact()))
    return {"off": error, "bar": bar, "runs": runs, "same bits": same}


def of_loss(name, n, d, link="softmax", dtype=torch.float32, stored=None, **options):
    """A kernel of a linear loss, and its reference."""
    given = kernels.problem(n, d, CLASSES, dtype, link)
    found, exact = kernels.KERNELS[name]
    given = given if stored is None else given._replace(x=given.x.to(stored))
    return partial(found, given, **options), partial(exact, kernels.exactly(given))


def of_steps(name, dtype):
    """Six steps of a solver for a diagonal A."""

    def solve(step, b):
        start, diagonal = kernels.started(name, b, 0.0), 1 + b.sigmoid()
        return kernels.vectors(kernels.run(step, start, diagonal.mul, 6))[0]

    step, reference, _ = kernels.STEPS[name]
    b = kernels.draw(size(100_003, 2051), dtype=dtype)
    return partial(solve, step, b), partial(solve, reference, b.double())


def of_heads(d, dtype):
    """Steps of CG for heads with biases, in sample space or directly."""
    given, steps = kernels.heads(size(64, 3), 25, d, 5, dtype), size(10, 4)
    return (
        lambda: head_cg.head_cg(*given, steps).value,
        lambda: head_cg.reference(*kernels.exactly(given), steps).value,
    )


def of_operation(name, kernel, foreseen):
    """Two derivatives of a loss, with a kernel and without."""
    both = partial(kernels.two_derivatives, name, foreseen=foreseen)
    return (lambda: both(kernel=kernel)[0]), (lambda: both(kernel="torch")[0])


def of_outer_steps(kind, fuse, estimator):
    """Hypergradients of three outer steps, captured, and by double backward."""
    return tuple(
        partial(hypergradients, engine, kind, fuse, estimator)
        for engine in ("traced", "double_backward")
    )


def hypergradients(engine, kind, fuse, estimator):
    """The outer gradients of three outer steps."""
    with torch.device(DEVICE):
        case = base.make_case(kind, size(300, 12), decay=1.0)
    case = products.with_ops(case) if fuse else case
    optimizer = tb.BilevelOptimizer(
        torch.optim.SGD(case.params, lr=0.1, weight_decay=case.decay),
        torch.optim.SGD([case.weights], lr=1.0),
        modules=case.model, estimator=estimator, products=engine,
    )  # fmt: skip
    train_loss, found = optimizer.inner_loss(case.loss), []
    optimizer.outer_loss(case.valid_loss)
    for _ in range(3):
        optimizer.zero_grad()
        train_loss(*case.batch).backward()
        optimizer.step()
        optimizer.outer_step(*case.valid)
        found.append(case.weights.grad.clone())
    return torch.stack(found)


def checks():
    """What is compared, how large its error may be, and in how many runs; urgent ones first."""
    n, d = size((1008, 192), (40, 144))
    visits, all_of = kernels.VISITS, tuple(kernels.KERNELS)
    estimators = (
        "cg(max_steps=5, rtol=0., warm_start=False)", "cg(max_steps=20, rtol=1e-4)",
        "neumann(num_steps=6, step_size=0.05)",
    )  # fmt: skip
    for dtype, bar in ((torch.float32, 1e-6), (torch.float64, 1e-12)):
        for name in all_of:
            yield partial(of_loss, name, n, d, dtype=dtype), bar
        for name in kernels.STEPS:
            yield partial(of_steps, name, dtype), 10 * bar
        for features in (512, 64):
            yield partial(of_heads, features, dtype), 10 * bar
        if dtype is torch.float32:
            for case in itertools.product(
                ("softmax", "mlp"), (False, True), estimators
            ):
                if case[:2] != ("mlp", True):
                    yield partial(of_outer_steps, *case), 3e-3, 1
            for name in all_of:
                yield partial(of_loss, name, n - 7, d + 11), bar
            for name in visits:
                yield partial(of_loss, name, n, d, stored=torch.bfloat16), bar
            for name, features in itertools.product(visits, (24, 100, 250, 784)):
                yield partial(of_loss, name, n, features, tf32=True), 5e-3
                if features <= one_pass.PRECISE:
                    yield partial(of_loss, name, n, features), bar
            for link in ("smoothed", "logistic", "squared"):
                for name in all_of:
                    yield partial(of_loss, name, n, d, link), bar
    for how in itertools.product(LOSSES, KERNELS, (False, True)):
        yield partial(of_operation, *how), 1e-12, 3


def named(make):
    """A check by its arguments."""
    options = [f"{name}={value}" for name, value in make.keywords.items()]
    words = [make.func.__name__.removeprefix("of_"), *make.args, *options]
    return " ".join(map(str, words))


def correctness():
    """Everything that must hold."""
    for make, *rest in checks():
        yield named(make), compared, make, *rest


def tuning():
    """First uses at the sizes of the benchmarks."""
    big = size((60000, 784), (40, 144))
    resident = one_pass.RESIDENT_KERNELS[size(1024, 256)]
    for tuned, make in (
        (one_pass.CHUNKED, partial(of_loss, "one_pass", *big)),
        (joint.JOINT, partial(of_loss, "joint", *big)),
        (one_pass.CHUNKED, partial(of_loss, "one_pass", *big, stored=torch.float16)),
        (resident, partial(of_loss, "one_pass", *big, tf32=True)),
        (None, partial(of_loss, "two_pass", *big)),
        (None, partial(of_loss, "joint_two_pass", *big)),
        (None, partial(of_loss, "rows", *big)),
        (None, partial(of_loss, "joint_rows", *big)),
        *((None, partial(of_steps, name, torch.float32)) for name in kernels.STEPS),
        (None, partial(of_heads, 512, torch.float32)),
    ):
        yield named(make), first_use, tuned, make


def first_use(session, tuned, make):
    """Seconds it takes; milliseconds of all configurations, and the one chosen."""
    (run, _), began = make(), time.perf_counter()
    run()
    is_broken()
    found = {"seconds": time.perf_counter() - began}
    if tuned is not None:
        timings = getattr(tuned.tuner, "configs_timings", None) or {}
        found |= {str(config): times[0] for config, times in timings.items()}
        found["chosen"] = str(getattr(tuned.tuner, "best_config", "the first"))
    return found


# --- products -------------------------------------------------------------------------


def cases(session, kind, n):
    """Copies of a case that together outgrow the cache, each with a v."""
    with torch.device(DEVICE):
        case = base.make_case(kind, n)
        v = torch.randn(case.size)
    if session.args.data and kind == "softmax":
        found, _ = products.mnist(session.args.data, n, case.batch[1].cpu())
        case.batch = tuple(t.to(DEVICE) for t in found)
    count = cold(4 * case.batch[0].numel())
    return [(copy.deepcopy(case), v) for _ in range(count)]


def fresh(case, kernel=None, stored=torch.float32):
    """The same case with leaves of its own, for recording a step moves them."""
    function = partial(ops.linear_cross_entropy, kernel=kernel)
    return replace(
        case,
        model=copy.deepcopy(case.model),
        weights=case.weights.detach().clone().requires_grad_(),
        batch=(case.batch[0].to(stored), case.batch[1]),
        fused=kernel and SimpleNamespace(linear_cross_entropy=function),
    )


def linearized(case, engine="double_backward", **options):
    """The library's products at a recorded step."""
    return products.linearized(products.recorded(fresh(case, **options), engine))


def called(engine, kernel, case, v):
    """H v as the library gives it."""
    return partial(linearized(case, engine, kernel=kernel).hvp, v)


def uncached(case, v):
    """Double backward with a new graph each time."""
    vs = case.split(v)
    return lambda: torch.autograd.grad(base.graph_of_gradient(case), case.params, vs)


def kept_pullback(case, v):
    """``torch.func.vjp`` of the gradient, kept, as TorchOpt makes it."""
    gradient, weights = torch.func.grad(case.functional_loss), case.weights.detach()
    params, vs = tuple(p.detach() for p in case.params), tuple(case.split(v))
    _, pull = torch.func.vjp(lambda p: gradient(p, weights), params)
    return lambda: pull(vs)[0]


def in_jax(name, *args, **options):
    """A competitor of ``jax_peers.py``; JAX is imported when the first of them is built."""
    made = []

    def build(*given):
        if not made:
            peer = getattr(importlib.import_module("jax_peers"), name)
            made.append(peer(*args, **options) if isinstance(peer, type) else peer)
        return made[0](*given)

    return build


class Traced:
    """Products of one recorded program at the points of all copies, as bare graphs."""

    optimizer = None

    def __init__(self, engine="traced", **options):
        self.engine, self.options = engine, options

    def __call__(self, case, v):
        case = fresh(case, **self.options)
        self.optimizer = self.optimizer or products.recorded(case, self.engine)
        calls = self.optimizer._recorder.window.steps()[-1].calls
        here = [(replace(call, args=case.batch, kept=None), w) for call, w in calls]
        at = self.optimizer.products.linearize(self.optimizer.problem, here)
        ((recording, values, _),) = at.parts
        return replayed(partial(recording.product(True, False), v, *values.kept))


def softmax(session, n):
    """H v of weighted softmax regression."""
    copies, d = cases(session, "softmax", n), base.MODELS["softmax"][1][0]
    targets = {1024: {"two_pass": 12}, 60000: {"two_pass": 105, "one_pass": 65}}
    if n == 60000:
        targets[n]["two_pass, x in float16"] = 36
    targets = {f"ours, {k}, traced, graph": us for k, us in targets.get(n, {}).items()}
    moved = 4 * n * d + 4 * n * CLASSES + 8 * d * CLASSES
    race = Race(session, copies, moved, targets)
    race.add(FIRST, base.raw)
    race.add("double backward, nothing kept", uncached)
    race.add("jvp(grad)", base.functional)
    race.add("kept vjp of the gradient (TorchOpt)", kept_pullback)
    race.add("curvlinops", base.curvlinops)
    race.add_jax("JAX jit(linearize(grad))", "Product")
    race.add_jax("JAX, 20 in a program", "Product", per=20)
    race.add("formulas by hand", base.formulas)
    for kernel in ("torch", *KERNELS, None):
        name = f"ours, {kernel or 'F.cross_entropy'}"
        race.add(f"{name}, double_backward", partial(called, "double_backward", kernel))
        race.add(f"{name}, traced, called", partial(called, "traced", kernel), True)
        race.add(f"{name}, traced, graph", Traced(kernel=kernel))
    for kernel in VISITS:
        half = Traced(kernel=kernel, stored=torch.float16)
        race.add(f"ours, {kernel}, x in float16, traced, graph", half)
    return race.run()


def transformer(session, n):
    """H v of a transformer of two layers."""
    copies = cases(session, "transformer", n)[:1]
    race = Race(session, copies, targets={"ours, traced(compile=True), graph": 350})
    race.add(FIRST, base.raw)
    race.add("double backward, nothing kept", uncached)
    race.add("jvp(grad)", base.functional)
    race.add_jax("JAX jit(linearize(grad))", "Product")
    race.add_jax("JAX, 20 in a program", "Product", per=20)
    for engine in ("traced", "traced(compile=True)"):
        race.add(f"ours, {engine}, called", partial(called, engine, None))
        race.add(f"ours, {engine}, graph", Traced(engine))
    return race.run()


# --- the joint oracle -----------------------------------------------------------------


def foreseen(kernel, case, v):
    """One graph; the direction is known before the loss is evaluated."""
    case = fresh(case, kernel)
    run, parts = base.oracle_shared(case, v), case.split(v)

    def oracle():
        with ops.foreseen(case.params, parts):
            return run()

    return oracle


def bare_oracle(kernel, case, v):
    """The operation alone as a graph, with the derivative in the logits of the weights."""
    at, along = (
        Direction(*(t.detach() for t in p)) for p in (case.params, case.split(v))
    )
    (x, y), logits, link = case.batch, case.weights.detach(), _Indices(kernel)
    share = torch.full((), 1 / len(y), device=DEVICE)

    def run():
        omega = logits.sigmoid()
        found = fused.joint_oracle(link, x, at, along, y, share, omega)
        cross = share * found.slopes * omega * (1 - omega)
        return found.loss, found.gradient, found.product, cross

    return replayed(run)


def oracle(session, n):
    """Loss, gradient, H v and J v of softmax regression."""
    copies, d = cases(session, "softmax", n), base.MODELS["softmax"][1][0]
    targets = {1024: {"two_pass": 20}, 60000: {"two_pass": 110, "one_pass": 75}}
    targets = {f"ours, {k}, graph": us for k, us in targets.get(n, {}).items()}
    P, moved = copies[0][0].size, 4 * n * d + 8 * n + 16 * d * CLASSES
    race = Race(session, copies, moved, targets, (1, 1 + P, 1 + 2 * P))
    race.add("one graph", base.oracle_shared)
    race.add("three calls", base.oracle_separate)
    race.add_jax("JAX jit(jvp(value_and_grad))", "Oracle")
    for kernel in ("torch", *KERNELS):
        race.add(f"ours, {kernel}", partial(foreseen, kernel))
    for kernel in KERNELS:
        race.add(f"ours, {kernel}, graph", partial(bare_oracle, kernel))
    return race.run()


# --- solves ---------------------------------------------------------------------------


def waits(solve):
    """How often the host waits for the device; none was confirmed by making it an error."""
    if DRY:
        return products.Counter().of(lambda _: solve(), 0)["sync"]
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            solve()
        count = sum("called a synchronizing" in str(w.message) for w in seen)
        if not count:
            torch.cuda.set_sync_debug_mode("error")
            solve()
    except RuntimeError as error:
        return products.reason(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return count


def ours(engine, whole, steps, case, b):
    """The library's CG for H + decay; ``whole``: may be captured, products and all."""
    at, memory, decay = linearized(case, engine), Memory(), case.decay
    solver = tb.CG(max_steps=steps, rtol=0.0)

    def times(product, v, *inputs):
        return product(v, *inputs).add(v, alpha=decay)

    def program():
        known = at.program()
        run = known and partial(times, known.run)
        return known and replace(known, key=(known.key, decay), run=run)

    def solve():
        run = partial(times, at.hvp)
        operator = Operator(run, len(b), program=program if whole else None)
        return solver.solve(operator, b, memory=memory).value

    return solve


def listed(solve, case, b):
    """CG on lists of tensors, ``solve(product, b)``, over a kept graph."""
    parts, params, b = base.graph_of_gradient(case), case.params, case.split(b)

    def product(vs):
        found = torch.autograd.grad(parts, params, vs, retain_graph=True)
        return [a + case.decay * v for a, v in zip(found, vs, strict=True)]

    return lambda: solve(product, b)


def flat(steps, case, b):
    """CG on flat vectors over a kept graph."""
    times = listed(lambda product, _: product, case, b)()

    def product(p, out):
        torch.cat([part.reshape(-1) for part in times(case.split(p))], out=out)

    return lambda: base.flat_cg(product, b, steps)


def solver(session, n, steps):
    """CG for an MLP 784-300-10."""
    ((case, b), *_), whole = cases(session, "mlp", n), "ours, traced, one graph"
    case.decay = 1.0  # positive curvature: everybody makes all steps
    race = Race(session, [(case, b)], targets={whole: 1100})

    def torchopt(product, b):
        solve = importlib.import_module("torchopt").linalg.cg
        return solve(product, b, rtol=0.0, maxiter=steps)

    race.add("CG by hand, kept graph", partial(flat, steps))
    race.add("TorchOpt's CG", partial(listed, torchopt))
    race.add("hypertorch's CG", partial(listed, partial(base.list_cg, steps=steps)))
    race.add_jax("JAX, unrolled, one program", "Solver", steps, case.decay)
    race.add_jax("JAX's own CG, one program", "Solver", steps, case.decay, shipped=True)
    race.add("ours, double_backward", partial(ours, "double_backward", False, steps))
    race.add("ours, traced, a graph a product", partial(ours, "traced", False, steps))
    race.add(whole, partial(ours, "traced", True, steps))
    for name, (timer, (solve,), _) in race.entered.items():
        if timer is by_events:  # PyTorch knows nothing of JAX
            race.found["rows"][name]["note"] = f"the host waits: {waits(solve)}"
    return race.run()


def loop_over(steps, decay, heads):
    """CG on lists for one task after the other, over kept graphs."""
    solves = []
    for head, x, y, v in zip(heads.heads, heads.x, heads.y, heads.v, strict=True):
        head = head.detach().requires_grad_()
        loss = nn.functional.cross_entropy(x @ head.mT, y)
        graph = torch.autograd.grad(loss, head, create_graph=True)

        def product(vs, graph=graph, head=head):
            found = torch.autograd.grad(graph, head, vs, retain_graph=True)
            return [found[0] + decay * vs[0]]

        solves.append(partial(base.list_cg, product, [v], steps))
    return lambda: [solve() for solve in solves]


def batched(solve, steps, decay, heads):
    """All tasks at once, by the kernel or by operations of PyTorch."""
    x, b = heads.x, Direction(heads.v, None)
    state = torch.bmm(heads.heads.detach(), x.mT).softmax(1)
    scale = torch.full(x.shape[:2], 1 / x.shape[1], device=DEVICE)
    damping = torch.full((), decay, device=DEVICE)
    args = _Indices(), x, state, scale, damping, b, steps
    return lambda: solve(*args).value.weight


def few_shot(session, tasks):
    """CG for so many heads of 25 × 512, 5-way."""
    with torch.device(DEVICE):
        heads = base.Heads(tasks)
    nbytes, how = 4 * heads.x.numel(), (10, 0.01)
    copies = [(copy.deepcopy(heads),) for _ in range(cold(nbytes))]
    moved = nbytes + 8 * heads.v.numel()
    race = Race(session, copies, moved, {"head_cg": 150, "head_cg, graph": 150})
    race.add("loop over kept graphs", partial(loop_over, *how), single=True)
    race.add_jax("JAX, unrolled, one program", "FewShot", *how)
    for name, solve in (("batched", head_cg.reference), ("head_cg", head_cg.head_cg)):
        race.add(name, build := partial(batched, solve, *how))
        race.add(f"{name}, graph", lambda heads, build=build: replayed(build(heads)))
    return race.run()


# --- vectors --------------------------------------------------------------------------


def repeated(step, module, a, b, c):
    """A step that can be repeated: it reads the half of the state that it does not write.

    Some vectors are so small beside others that a step moves nothing by more than rounding.
    """
    zero, one = a.new_zeros(()), a.new_ones(())
    small, warm, q = 1e-10 * one, zero > 0, b
    if module is cg_step:
        state = module.started(small * a, zero, warm)
        state.rows[2, : len(b)] = b
    elif module is richardson_step:
        state = module.started(c, a, small, zero, warm)
    else:
        state = module.started(c, a, (small, small, one), 2 * one, zero, warm)
        state.p.copy_(small * b)
        q = small * a
    state.numbers[1], state.flags[1] = state.numbers[0], state.flags[0]
    if module is not cg_step:  # the step before was the best so far
        state.parts[1, :, 0], state.flags[1, module.PENDING] = one, 1
        state.flags[1, module.GOING] = 1
    held = [state]

    def run():
        held[0] = state = step(held[0], q, 1)
        return kernels.vectors(state)[:3]

    return run


def vectors(session, name, nbytes, n):
    """The vector work of one step; iterations without CG's guarantee keep their best iterate."""
    kernel, reference, module = kernels.STEPS[name]
    target = 1e6 * nbytes * n / (0.8 * session.bandwidth)
    targets = {"kernel": target, "kernel, graph": target}
    given = [torch.randn(n, device=DEVICE) for _ in range(3)]
    race = Race(session, [given], nbytes * n, targets)
    race.add("operations of PyTorch", partial(repeated, reference, module))
    if module is cg_step:
        step = lambda a, b, _: in_jax("cg_step")(0 * a, 1e-10 * a, b, b)  # noqa: E731
        race.add("JAX, one program", step, timer=by_clock)
    race.add("kernel", partial(repeated, kernel, module))
    race.add("kernel, graph", lambda *abc: replayed(repeated(kernel, module, *abc)))
    return race.run()


PARTS = {  # seconds it may take, and its items: name, function, arguments
    "roofline": (20, lambda: [("device", measured)]),
    "correctness": (130, correctness),
    "tuning": (60, tuning),
    "products": (180, lambda: [
        *((f"softmax, n = {n}", softmax, n) for n in SIZES),
        ("transformer, n = 16", transformer, size(16, 2)),
    ]),
    "oracle": (50, lambda: [(f"softmax, n = {n}", oracle, n) for n in SIZES]),
    "solver": (70, lambda: [("MLP, 20 steps", solver, *size((1024, 20), (12, 2)))]),
    "heads": (30, lambda: [("256 heads, 10 steps", few_shot, size(256, 3))]),
    "vectors": (20, lambda: [
        (name, vectors, name, nbytes, size(10_000_000, 3000))
        for name, nbytes in (("cg", 40), ("richardson", 24), ("heavy ball", 32))
    ]),
}  # fmt: skip


# --- output ---------------------------------------------------------------------------


def ratios(found, kind):
    """Times of competitors over that of the first; NaN where there is none."""
    times = {name: row.get(kind, math.nan) for name, row in found["rows"].items()}
    return {name: value / next(iter(times.values())) for name, value in times.items()}


def table(found, bandwidth):
    """A race as Markdown."""
    heads = "| | cold, µs | warm, µs | × first | of roofline | target, µs | off by | |"
    lines, over = [heads, "|---" * 8 + "|"], [ratios(found, kind) for kind in KINDS]
    for name, row in found["rows"].items():
        numbers = [row.get(kind, math.nan) for kind in KINDS]
        taken = numbers[0] if numbers[0] > 0 else numbers[1]
        share = 1e6 * found["moved"] / bandwidth / taken
        times = next((known[name] for known in over if known[name] > 0), math.nan)
        cells = [f"{number:.1f}" for number in numbers] + [f"{times:.3g}"]
        cells += [f"{share:.0%}", f"{found['targets'].get(name, math.nan):.0f}"]
        cells += [f"{row.get('off', math.nan):.0e}", row.get("note") or ""]
        cells = ["–" if cell in ("nan", "nan%", "0%") else cell for cell in cells]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def described(name, found, bandwidth):
    """One item."""
    if "rows" in found:
        return f"\n**{name}**\n\n{table(found, bandwidth)}\n"
    rounded = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in found.items()}
    good = "bar" not in found or (found["off"] <= found["bar"] and found["same bits"])
    name = f"- {name}" if good and "failed" not in found else f"- **FAILS** {name}"
    return f"{name}: " + "; ".join(f"{k} {v}" for k, v in rounded.items())


def write(session):
    """Tables for ``docs/performance.md``, and a panel of bars for each race."""
    known = "; ".join(f"{k} {v}" for k, v in session.found["environment"].items())
    dry = ["**A dry run: no figure here is a measurement.**"] if DRY else []
    lines, panels = ["## On a GPU", "", known, "", *dry, ""], {}
    for name, found in session.found["items"].items():
        lines.append(described(name, found, session.bandwidth))
        over = {k: ratios(found, k) for k in KINDS if found.get("rows")}
        shown = [k for k, values in over.items() if any(v > 0 for v in values.values())]
        bars = [products.Row(f"/{k}", "× first", over[k], over[k]) for k in shown]
        panels |= {f"no measurement: {name}" if DRY else name: bars} if bars else {}
    if session.args.output:
        Path(session.args.output).write_text("\n".join(lines) + "\n")
    if session.args.figure and panels:
        products.draw(session.args.figure, panels)


def shrink(args):
    """Tiny models, and solvers that treat the CPU as a device."""
    if not args.data:
        base.MODELS["softmax"] = (lambda: nn.Linear(24, CLASSES)), (24,)
    layers = nn.Linear(9, 5), nn.ReLU(), nn.Linear(5, CLASSES)
    base.MODELS["mlp"] = (lambda: nn.Sequential(*copy.deepcopy(layers))), (9,)
    cg.on_host, cg.by_kernels = (lambda b: False), (lambda b: True)


def parse_arguments():
    default = str(Path(tempfile.gettempdir(), "gpu.json"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--cuda", action="store_true", help="measure")
    how.add_argument("--dry", action="store_true", help="run every path on a CPU")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=size(30, 2))
    parser.add_argument("--seconds", type=float, default=560, help="for everything")
    parser.add_argument("--data", metavar="DIR", help="MNIST idx files")
    parser.add_argument("--json", metavar="FILE", default=default, help="every number")
    parser.add_argument("--output", metavar="FILE", help="tables, as Markdown")
    parser.add_argument("--figure", metavar="FILE", help="PNG")
    parser.add_argument("--resume", type=float, help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    args = parse_arguments()
    if DRY:
        shrink(args)
    base.ROWS, kernels.DEVICE = 2**31, DEVICE  # formulas take all rows at once
    warnings.filterwarnings("ignore", message=".*deterministic.*")
    session = Session(args)
    print(json.dumps(session.found["environment"], indent=1), flush=True)
    for part in dict.fromkeys(["roofline", *args.parts]):
        seconds, items = PARTS[part]
        for item in items():
            session.item(part, seconds, *item)
        write(session)
    print(f"{time.time() - session.began:.0f} s in all")


if __name__ == "__main__":
    with sdpa_kernel(SDPBackend.MATH):  # the other kernels have no second derivative
        main()
