"""Problems with a known hypergradient, through `hypergradient`, `implicit_root` and `unroll`.

Formulas are derived in the problems' docstrings; every problem gives g, f, x, y*(x) and ∇Φ(x).
"""

import pytest
import torch
from torch.func import grad, hessian

import torch_bilevel as tb


def spd(n):
    a = torch.randn(n, n)
    return a @ a.T / n + 0.5 * torch.eye(n)


class Quadratic:
    """g = ½yᵀAy + xᵀCy + aᵀy,  f = ½yᵀFy + ½xᵀHx + xᵀKy + fᵀy + hᵀx.

    ∇Φ = Hx + Ky + h − C A⁻¹(Fy + Kᵀx + f);  with R = −A⁻¹Cᵀ: ∇²Φ = H + KR + (KR)ᵀ + RᵀFR.
    """

    def __init__(self):
        n, m = 4, 3
        self.A, self.F, self.H = spd(n), spd(n), spd(m)
        self.C, self.K = torch.randn(m, n), torch.randn(m, n)
        self.a, self.f1, self.h = torch.randn(n), torch.randn(n), torch.randn(m)
        self.x = torch.randn(m)

    def g(self, y, x, batch=None):
        return y @ self.A @ y / 2 + x @ self.C @ y + self.a @ y

    def f(self, y, x, batch=None):
        quadratic = y @ self.F @ y / 2 + x @ self.H @ x / 2 + x @ self.K @ y
        return quadratic + self.f1 @ y + self.h @ x

    def solution(self, x):
        return -torch.linalg.solve(self.A, self.C.T @ x + self.a)

    def exact(self, x):
        y = self.solution(x)
        v = torch.linalg.solve(self.A, self.F @ y + self.K.T @ x + self.f1)
        return self.H @ x + self.K @ y + self.h - self.C @ v

    def second(self, x):
        R = -torch.linalg.solve(self.A, self.C.T)
        return self.H + self.K @ R + (self.K @ R).T + R.T @ self.F @ R


class LeastSquares:
    """Twelve equations to fit, and nine that judge the fit."""

    num_outer: int

    def __init__(self):
        self.X, self.t = torch.randn(12, 4), torch.randn(12)
        self.Xv, self.tv = torch.randn(9, 4), torch.randn(9)
        self.x = torch.randn(self.num_outer)

    def f(self, w, x, batch=None):
        return ((self.Xv @ w - self.tv) ** 2).mean() / 2


class Ridge(LeastSquares):
    """One log-penalty a coordinate: ∇Φ = −e^λ ∘ w* ∘ (XᵀX/n + diag e^λ)⁻¹ r."""

    num_outer = 4

    def g(self, w, x, batch=None):
        fit = ((self.X @ w - self.t) ** 2).mean() / 2
        return fit + (x.exp() * w**2).sum() / 2

    def system(self, x):
        return self.X.T @ self.X / 12 + torch.diag(x.exp())

    def solution(self, x):
        return torch.linalg.solve(self.system(x), self.X.T @ self.t / 12)

    def exact(self, x):
        w = self.solution(x)
        r = self.Xv.T @ (self.Xv @ w - self.tv) / 9
        return -x.exp() * w * torch.linalg.solve(self.system(x), r)


class DataWeights(LeastSquares):
    """Hyper-cleaning by least squares: ∂Φ/∂x_i = −σ_i(1 − σ_i)/n (x_iᵀw − y_i)(x_iᵀq)."""

    num_outer = 12

    def g(self, w, x, batch=None):
        losses = (self.X @ w - self.t) ** 2 / 2
        return (x.sigmoid() * losses).mean() + 0.05 * (w**2).sum()

    def system(self, x):
        D = x.sigmoid()[:, None]
        return self.X.T @ (D * self.X) / 12 + 0.1 * torch.eye(4)

    def solution(self, x):
        return torch.linalg.solve(
            self.system(x), self.X.T @ (x.sigmoid() * self.t) / 12
        )

    def exact(self, x):
        w, s = self.solution(x), x.sigmoid()
        r = self.Xv.T @ (self.Xv @ w - self.tv) / 9
        q = torch.linalg.solve(self.system(x), r)
        return -s * (1 - s) / 12 * (self.X @ w - self.t) * (self.X @ q)


class Representation:
    """ŷ = X H w: ∇_H Φ = (X_vᵀr_v/m) wᵀ − (Xᵀr/n) qᵀ − (XᵀX H q/n) wᵀ."""

    def __init__(self):
        self.X, self.t = torch.randn(12, 5), torch.randn(12)
        self.Xv, self.tv = torch.randn(9, 5), torch.randn(9)
        self.x = torch.randn(5, 3)

    def g(self, w, H, batch=None):
        return ((self.X @ H @ w - self.t) ** 2).mean() / 2 + 0.05 * (w**2).sum()

    def f(self, w, H, batch=None):
        return ((self.Xv @ H @ w - self.tv) ** 2).mean() / 2

    def system(self, H):
        return H.T @ self.X.T @ self.X @ H / 12 + 0.1 * torch.eye(3)

    def solution(self, H):
        return torch.linalg.solve(self.system(H), H.T @ self.X.T @ self.t / 12)

    def exact(self, H):
        w = self.solution(H)
        r, rv = self.X @ H @ w - self.t, self.Xv @ H @ w - self.tv
        q = torch.linalg.solve(self.system(H), H.T @ self.Xv.T @ rv / 9)
        direct = torch.outer(self.Xv.T @ rv / 9, w)
        first = torch.outer(self.X.T @ r / 12, q)
        return direct - first - torch.outer(self.X.T @ self.X @ H @ q / 12, w)


class Inexact:
    """Ehrhardt–Roberts: Φ(w) = ‖Ax − b‖², x = argmin ‖Cw + Dx − e‖²."""

    def __init__(self):
        self.A, self.b = torch.randn(7, 4), torch.randn(7)
        self.C, self.D = torch.randn(9, 3), torch.randn(9, 4)
        self.e, self.x = torch.randn(9), torch.randn(3)

    def g(self, y, w, batch=None):
        return ((self.C @ w + self.D @ y - self.e) ** 2).sum()

    def f(self, y, w, batch=None):
        return ((self.A @ y - self.b) ** 2).sum()

    def solution(self, w):
        return torch.linalg.solve(self.D.T @ self.D, self.D.T @ (self.e - self.C @ w))

    def exact(self, w):
        y = self.solution(w)
        r = 2 * self.A.T @ (self.A @ y - self.b)
        return -2 * self.C.T @ self.D @ torch.linalg.solve(2 * self.D.T @ self.D, r)


PROBLEMS = [Quadratic, Ridge, DataWeights, Representation, Inexact]
SOLVERS = [
    "cg(max_steps=40, rtol=1e-14)",
    "minres(max_steps=40, rtol=1e-14)",
    "gmres(max_steps=40, rtol=1e-14)",
    "direct",
]


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_known_hypergradient(problem, solver):
    p = problem()
    y, expected = p.solution(p.x), p.exact(p.x)
    found, report = tb.func.hypergradient(p.g, p.f, solver)(y, p.x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(report.loss, p.f(y, p.x))
    solve = tb.func.implicit_root(grad(p.g), solver=solver)(lambda _, x: p.solution(x))

    def phi(x):
        return p.f(solve(y, x), x)

    torch.testing.assert_close(grad(phi)(p.x), expected, rtol=1e-10, atol=1e-12)

    def total(x):  # the hypergradient, with y a function of x
        return tb.func.hypergradient(p.g, p.f, solver)(solve(y, x), x)[0]

    # ∇²Φ three ways: of Φ twice, of the hypergradient, by central differences of the formula
    second, shape = hessian(phi)(p.x), (p.x.numel(), p.x.numel())
    torch.testing.assert_close(
        torch.func.jacrev(total)(p.x), second, rtol=1e-8, atol=1e-10
    )
    rows = []
    for row in torch.eye(p.x.numel()):
        e = 1e-5 * row.view_as(p.x)
        rows.append(((p.exact(p.x + e) - p.exact(p.x - e)) / 2e-5).reshape(-1))
    torch.testing.assert_close(
        second.reshape(shape), torch.stack(rows), rtol=1e-6, atol=1e-7
    )
    if problem is Quadratic:
        torch.testing.assert_close(second, p.second(p.x), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_truncated_series(steps):
    """v = A⁻¹(I − (I − ηA)^K) ∂_y f at any y, for Neumann and Richardson alike."""
    p, eta = Quadratic(), 0.2
    y = torch.randn(4)
    M = torch.linalg.matrix_power(torch.eye(4) - eta * p.A, steps)
    f_y = p.F @ y + p.K.T @ p.x + p.f1
    v = torch.linalg.solve(p.A, (torch.eye(4) - M) @ f_y)
    expected = p.H @ p.x + p.K @ y + p.h - p.C @ v
    for name in (
        f"neumann(num_steps={steps}, step_size={eta})",
        f"richardson(max_steps={steps}, step_size={eta}, rtol=0.0)",
        f"stochastic_neumann(num_steps={steps}, step_size={eta})",
    ):
        h = tb.func.hypergradient(p.g, p.f, name)
        found, report = h(y, p.x)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(report.adjoint, v)
        lanes = torch.func.vmap(lambda y, h=h: h(y, p.x)[0])(torch.stack([y, 2 * y]))
        torch.testing.assert_close(lanes[0], expected)


def test_one_dimension():
    """g = ½eˣ(y − b)², f = f(y): ITD −αhTq^(T−1)(y_0 − b)f'(y_T); AID-FP with T and T steps."""
    b, y0, alpha, T = 0.7, torch.tensor(2.0), 0.3, 5
    x = torch.tensor(-0.4)
    h, q = x.exp(), 1 - alpha * x.exp()

    def g(y, x, batch=None):
        return x.exp() * (y - b) ** 2 / 2

    def f(y):
        return y.sin()

    train = tb.func.unroll(f"sgd(lr={alpha})", T)(lambda y, x: g(y, x))
    y_T = train(y0, x)
    slope = grad(f)(y_T)
    expected = -alpha * h * T * q ** (T - 1) * (y0 - b) * slope
    torch.testing.assert_close(grad(lambda x: f(train(y0, x)))(x), expected)
    fp = tb.func.hypergradient(
        g, lambda y, x, _: f(y), f"neumann(num_steps={T}, step_size={alpha})"
    )
    expected = -(q**T) * (y0 - b) * (1 - q**T) * slope
    torch.testing.assert_close(fp(y_T, x)[0], expected)
