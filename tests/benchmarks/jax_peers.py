"""The same work in JAX, for ``gpu.py``: what ``jit`` makes of JAX's own transformations.

    product      linearize(grad(g)) at a kept point; one, or so many in one program
    oracle       (g, ∇g, H v, J v) by one jvp of value_and_grad
    solver       conjugate gradients over a kept linearisation, unrolled or as JAX ships it
    few_shot     the same for many heads at once
    cg_step      the vector work of one step of conjugate gradients

Everything is float32, matrix products too. Competitors are functions of the arguments that
``gpu.py`` gives to all, and return functions to be timed; a compiled program is shared by copies
of a problem, which have equal values in memory of their own.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import tree_map

jax.config.update("jax_default_matmul_precision", "highest")  # no TF32

HEADS, EPS = 4, 1e-5  # of `torch.nn.TransformerEncoderLayer`


def array(t):
    """A tensor as an array of JAX's own."""
    return jnp.array(np.asarray(t.detach().cpu()))


def arrays(tensors):
    """The same for a sequence."""
    return tuple(array(t) for t in tensors)


# --- models, with parameters in PyTorch's order ---------------------------------------


def linear(x, W, b):
    return x @ W.T + b


def mlp(x, W, b, *rest):
    """Linear layers, with ReLU between them."""
    out = linear(x, W, b)
    return mlp(jax.nn.relu(out), *rest) if rest else out


def norm(x, weight, bias):
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + EPS) * weight + bias


def encoder_layer(x, *p):
    """``torch.nn.TransformerEncoderLayer``: attention and two linear layers, normed after."""
    split = (*x.shape[:2], HEADS, -1)
    q, k, v = (part.reshape(split) for part in jnp.split(linear(x, *p[:2]), 3, -1))
    scores = jnp.einsum("nihd,njhd->nhij", q, k) / q.shape[-1] ** 0.5
    mixed = jnp.einsum("nhij,njhd->nihd", jax.nn.softmax(scores), v)
    x = norm(x + linear(mixed.reshape(x.shape), *p[2:4]), *p[8:10])
    return norm(x + mlp(x, *p[4:8]), *p[10:12])


def transformer(x, *p):
    """Encoder layers of 12 parameters each, the mean over tokens, a linear head."""
    *layers, W, b = p
    for first in range(0, len(layers), 12):
        x = encoder_layer(x, *layers[first : first + 12])
    return linear(x.mean(1), W, b)


def losses(outputs, y):
    """Cross-entropy of every example."""
    log_p = jax.nn.log_softmax(outputs)
    return -jnp.take_along_axis(log_p, y[:, None], 1)[:, 0]


def model_of(case):
    """The function that computes the model of a case."""
    kinds = {1: transformer, 0: mlp}  # a linear model is an MLP of one layer
    return kinds[case.batch[0].dim() == 3]


def loss_of(case):
    """g of the weights' logits, as a function of them, the batch, and the parameters."""
    model = model_of(case)

    def loss(params, logits, x, y):
        return (jax.nn.sigmoid(logits) * losses(model(x, *params), y)).mean()

    return loss


# --- products -------------------------------------------------------------------------


class Kept:
    """``run(product, v)``, compiled, of a product that is linearised once.

    Args:
        run: what is timed; what it is called with besides the product are its arguments.
    """

    def __init__(self, run):
        self.run, self.known = jax.jit(run), None

    def at(self, gradient, point, *args):
        """``run`` with a product at ``point`` whose numbers are a copy of their own."""
        if self.known is None:
            self.known = jax.linearize(gradient, point)[1]
        product = tree_map(partial(jnp.array, copy=True), self.known)
        return partial(self.run, product, *args)


def gradient_of(case):
    """∂_y g as a function of the parameters alone, and the parameters."""
    given = array(case.weights), *arrays(case.batch)
    gradient = jax.grad(loss_of(case))
    return (lambda params: gradient(params, *given)), arrays(case.params)


class Product(Kept):
    """H v; with ``per`` above 1 also H² v, H³ v, … in the same program."""

    def __init__(self, per=1):
        def run(product, vs):
            first = product(vs)
            more = jax.lax.fori_loop(1, per, lambda _, u: product(u), first)
            return (first, more) if per > 1 else first

        super().__init__(run)

    def __call__(self, case, v):
        return self.at(*gradient_of(case), arrays(case.split(v)))


class Oracle:
    """(g, ∇g, H v, J v) at a fresh batch, in one program."""

    run = None

    def __call__(self, case, v):
        both = jax.value_and_grad(loss_of(case), argnums=(0, 1))

        def run(params, logits, x, y, vs):
            at = lambda params: both(params, logits, x, y)  # noqa: E731
            (loss, (gradient, _)), (_, (Hv, Jv)) = jax.jvp(at, (params,), (vs,))
            return loss, gradient, Hv, Jv

        self.run = self.run or jax.jit(run)
        given = arrays(case.params), array(case.weights), *arrays(case.batch)
        return partial(self.run, *given, arrays(case.split(v)))


# --- solves ---------------------------------------------------------------------------


def conjugate_gradients(product, b, steps, dot):
    """Unrolled, from zero, on trees; ``dot`` gives numbers that broadcast over leaves."""
    move = lambda a, x, y: tree_map(lambda x, y: x + a * y, x, y)  # noqa: E731
    x, r, p = tree_map(jnp.zeros_like, b), b, b
    rr = dot(r, r)
    for _ in range(steps):
        q = product(p)
        alpha = rr / dot(p, q)
        x, r = move(alpha, x, p), move(-alpha, r, q)
        rr, before = dot(r, r), rr
        p = move(rr / before, r, p)
    return x


def dot(a, b):
    """The inner product of two trees."""
    return sum(jnp.vdot(u, v) for u, v in zip(a, b, strict=True))


class Solver(Kept):
    """(H + decay) v = b by so many steps."""

    def __init__(self, steps, decay, shipped=False):
        def run(product, b):
            damped = lambda v: tree_map(lambda h, u: h + decay * u, product(v), v)  # noqa: E731
            if shipped:
                solve = jax.scipy.sparse.linalg.cg
                return solve(damped, b, tol=0.0, maxiter=steps)[0]
            return conjugate_gradients(damped, b, steps, dot)

        super().__init__(run)

    def __call__(self, case, b):
        return self.at(*gradient_of(case), arrays(case.split(b)))


class FewShot(Kept):
    """The same for every head of a `Heads` at once: the sum of their losses is block-diagonal."""

    def __init__(self, steps, decay):
        def each(a, b):
            return (a * b).sum((1, 2), keepdims=True)

        def run(product, b):
            damped = lambda v: product(v) + decay * v  # noqa: E731
            return conjugate_gradients(damped, b, steps, each)

        super().__init__(run)

    def __call__(self, heads):
        x, y = array(heads.x), array(heads.y)

        def total(at):
            outputs = jnp.einsum("tnd,tcd->tnc", x, at)
            return jax.vmap(losses)(outputs, y).mean(1).sum()

        return self.at(jax.grad(total), array(heads.heads), array(heads.v))


@jax.jit
def _step(x, r, p, q, rr):
    alpha = rr / jnp.vdot(p, q)
    x, r = x + alpha * p, r - alpha * q
    ahead = jnp.vdot(r, r)
    return x, r, r + (ahead / rr) * p, ahead


def cg_step(x, r, p, q):
    """One step; the first three of what it gives are x, r and p."""
    x, r, p, q = arrays((x, r, p, q))
    rr = jnp.vdot(r, r)
    return lambda: _step(x, r, p, q, rr)[:3]
