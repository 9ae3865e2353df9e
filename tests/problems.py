"""Bilevel problems whose hypergradient is known in closed form.

Each problem owns its live parameters ``y`` and ``x`` (lists of leaves of several shapes), the two
losses as plain closures, y*(x) and the exact hypergradient. Formulas: see each docstring.
"""

import torch
import torch.nn.functional as F

import torch_bilevel as tb


def spd(n, low=1.0, high=4.0, generator=None):
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator))
    return q @ torch.diag(torch.linspace(low, high, n)) @ q.T


def leaves(*shapes, scale=1.0):
    return [(scale * torch.randn(shape)).requires_grad_() for shape in shapes]


def flat(tensors):
    return torch.cat([t.reshape(-1) for t in tensors])


def fill(tensors, vector):
    with torch.no_grad():
        start = 0
        for t in tensors:
            t.copy_(vector[start : start + t.numel()].view(t.shape))
            start += t.numel()


class Problem:
    """``y``, ``x``, ``train_loss(*batch)``, ``valid_loss()``, ``solution()``, ``exact()``."""

    batches = [()]

    def solve(self):
        """Put the inner parameters at y*(x)."""
        fill(self.y, self.solution())

    def optimizer(self, inner=None, outer=None, **options):
        """A BilevelOptimizer of the problem with both losses registered."""
        inner = inner or torch.optim.SGD(self.y, lr=0.05)
        outer = outer or torch.optim.SGD(self.x, lr=0.1)
        optimizer = tb.BilevelOptimizer(inner, outer, **options)
        self.train = optimizer.inner_loss(self.train_loss)
        self.valid = optimizer.outer_loss(self.valid_loss)
        return optimizer

    def steps(self, optimizer, num_steps=1):
        """Ordinary inner steps over the batches."""
        for k in range(num_steps):
            optimizer.zero_grad()
            self.train(*self.batches[k % len(self.batches)]).backward()
            optimizer.step()

    def hypergradient(self, optimizer, **options):
        return flat(optimizer.hypergradient(**options))


class Quadratic(Problem):
    """g = ½yᵀAy + xᵀCy + aᵀy;  f = ½yᵀFy + ½xᵀHx + xᵀKy + f₁ᵀy + h₁ᵀx.

    y* = −A⁻¹(Cᵀx + a);  ∇Φ = Hx + Ky* + h₁ − CA⁻¹(Fy* + Kᵀx + f₁).
    """

    def __init__(self, shapes_y=((2, 3), (), (4,)), shapes_x=((3,), (2, 2)), A=None):
        self.y, self.x = leaves(*shapes_y), leaves(*shapes_x)
        p, d = flat(self.y).numel(), flat(self.x).numel()
        self.A = spd(p) if A is None else A
        self.F, self.H = spd(p), spd(d)
        self.C, self.K = torch.randn(d, p), torch.randn(d, p)
        self.a, self.f1, self.h1 = torch.randn(p), torch.randn(p), torch.randn(d)

    def train_loss(self):
        y, x = flat(self.y), flat(self.x)
        return y @ self.A @ y / 2 + x @ self.C @ y + self.a @ y

    def valid_loss(self):
        y, x = flat(self.y), flat(self.x)
        direct = x @ self.H @ x / 2 + x @ self.K @ y + self.h1 @ x
        return y @ self.F @ y / 2 + direct + self.f1 @ y

    def solution(self):
        return -torch.linalg.solve(self.A, self.C.T @ flat(self.x).detach() + self.a)

    def partials(self, y):
        x = flat(self.x).detach()
        return self.H @ x + self.K @ y + self.h1, self.F @ y + self.K.T @ x + self.f1

    def exact(self):
        to_x, to_y = self.partials(self.solution())
        return to_x - self.C @ torch.linalg.solve(self.A, to_y)


class FiniteSum(Quadratic):
    """The mean of n quadratics in either level; a batch is a tensor of indices.

    g_i and f_i have the matrices of `Quadratic` plus noise that sums to zero, so solution and
    hypergradient are `Quadratic`'s.
    """

    def __init__(self, n=8, noise=0.3, p=4, d=3, outer_noise=None, coupling=1.0):
        super().__init__(((p,),), ((d,),))
        self.C, self.K = coupling * self.C, coupling * self.K
        self.n, self.p, self.d = n, p, d

        def spread(size, *shape):
            parts = size * torch.randn(n, *shape)
            return parts - parts.mean(0)

        outer_noise = noise if outer_noise is None else outer_noise
        As = noise * torch.rand(n, 1, 1) * torch.stack([spd(p) for _ in range(n)])
        self.As = self.A + As - As.mean(0)
        self.Cs, self.as_ = self.C + spread(noise, d, p), self.a + spread(noise, p)
        self.fs = self.f1 + spread(outer_noise, p)
        self.hs = self.h1 + spread(outer_noise, d)

    def data(self, batch_size=1, seed=0):
        return tb.Batches((torch.arange(self.n),), batch_size, seed)

    def train_loss(self, index):
        (y,), (x,) = self.y, self.x
        A, C, a = (part[index].mean(0) for part in (self.As, self.Cs, self.as_))
        return y @ A @ y / 2 + x @ C @ y + a @ y

    def valid_loss(self, index):
        (y,), (x,) = self.y, self.x
        direct = x @ self.H @ x / 2 + x @ self.K @ y + self.hs[index].mean(0) @ x
        return y @ self.F @ y / 2 + direct + self.fs[index].mean(0) @ y

    def minimiser(self):
        """x* and ∇²Φ, which is constant."""
        R = -torch.linalg.solve(self.A, self.C.T)
        hessian = self.H + self.K @ R + (self.K @ R).T + R.T @ self.F @ R
        x = flat(self.x).detach()
        return x - torch.linalg.solve(hessian, self.exact()), hessian


class Ridge(Problem):
    """One log-penalty per coordinate; optionally by ``weight_decay`` of the optimizer.

    w* = (XᵀX/n + diag e^λ + wd)⁻¹Xᵀy/n;  ∇_λΦ = −e^λ ∘ w* ∘ (…)⁻¹ r,  r = X_vᵀ(X_v w* − y_v)/m.
    """

    def __init__(self, d=6, n=20, m=15, weight_decay=0.0):
        self.w, self.lam = leaves((d,), scale=0.1) + leaves((d,))
        self.y, self.x = [self.w], [self.lam]
        self.X, self.t = torch.randn(n, d), torch.randn(n)
        self.Xv, self.tv = torch.randn(m, d), torch.randn(m)
        self.weight_decay = weight_decay

    def train_loss(self):
        fit = ((self.X @ self.w - self.t) ** 2).mean() / 2
        return fit + (self.lam.exp() * self.w**2).sum() / 2

    def valid_loss(self):
        return ((self.Xv @ self.w - self.tv) ** 2).mean() / 2

    def matrix(self):
        n, d = self.X.shape
        penalty = torch.diag(self.lam.detach().exp()) + self.weight_decay * torch.eye(d)
        return self.X.T @ self.X / n + penalty

    def solution(self):
        return torch.linalg.solve(self.matrix(), self.X.T @ self.t / len(self.X))

    def exact(self):
        w = self.solution()
        r = self.Xv.T @ (self.Xv @ w - self.tv) / len(self.Xv)
        return -self.lam.detach().exp() * w * torch.linalg.solve(self.matrix(), r)


class DataWeights(Problem):
    """Weighted least squares with a weight σ(x_i) per example.

    ∂Φ/∂x_i = −σ_i(1 − σ_i)/n · (x_iᵀw* − y_i)(x_iᵀq),  q = (XᵀDX/n + ρI)⁻¹X_vᵀ(X_v w* − y_v)/m.
    """

    def __init__(self, d=5, n=24, m=15, rho=0.1, batch=None):
        self.w, self.logits = leaves((d,), scale=0.1) + leaves((n,))
        self.y, self.x = [self.w], [self.logits]
        self.X, self.t = torch.randn(n, d), torch.randn(n)
        self.Xv, self.tv = torch.randn(m, d), torch.randn(m)
        self.rho = rho
        parts = torch.arange(n).split(batch or n)
        self.batches = [(self.X[i], self.t[i], i) for i in parts]

    def train_loss(self, X, t, index):
        losses = (X @ self.w - t) ** 2 / 2
        penalty = self.rho * (self.w**2).sum() / 2
        return (self.logits[index].sigmoid() * losses).mean() + penalty

    def valid_loss(self):
        return ((self.Xv @ self.w - self.tv) ** 2).mean() / 2

    def matrix(self, index=slice(None)):
        X, s = self.X[index], self.logits.detach()[index].sigmoid()
        return X.T @ (s[:, None] * X) / len(X) + self.rho * torch.eye(X.shape[1])

    def solution(self):
        s = self.logits.detach().sigmoid()
        right = self.X.T @ (s * self.t) / len(self.X)
        return torch.linalg.solve(self.matrix(), right)

    def validation_gradient(self, w):
        return self.Xv.T @ (self.Xv @ w - self.tv) / len(self.Xv)

    def cross(self, index, w, v):
        """J v of one batch: zero outside it."""
        X, t, s = self.X[index], self.t[index], self.logits.detach()[index].sigmoid()
        result = torch.zeros(len(self.X))
        result[index] = s * (1 - s) / len(X) * (X @ w - t) * (X @ v)
        return result

    def exact(self):
        w = self.solution()
        v = torch.linalg.solve(self.matrix(), self.validation_gradient(w))
        return -self.cross(torch.arange(len(self.X)), w, v)


class HyperRepresentation(Problem):
    """Linear features XH (outer H), ridge head w.

    With G = HᵀXᵀXH/n + γI, r_t = XHw* − y, r_v = X_vHw* − y_v, q = G⁻¹HᵀX_vᵀr_v/m:
    ∇_HΦ = (X_vᵀr_v/m)w*ᵀ − (Xᵀr_t/n)qᵀ − (XᵀXHq/n)w*ᵀ.
    """

    def __init__(self, d=6, k=3, n=20, m=15, gamma=0.3):
        self.w, self.H = leaves((k,)) + leaves((d, k))
        self.y, self.x = [self.w], [self.H]
        self.X, self.t = torch.randn(n, d), torch.randn(n)
        self.Xv, self.tv = torch.randn(m, d), torch.randn(m)
        self.gamma = gamma

    def train_loss(self):
        fit = ((self.X @ self.H @ self.w - self.t) ** 2).mean() / 2
        return fit + self.gamma * (self.w**2).sum() / 2

    def valid_loss(self):
        return ((self.Xv @ self.H @ self.w - self.tv) ** 2).mean() / 2

    def matrix(self):
        Z = self.X @ self.H.detach()
        return Z.T @ Z / len(Z) + self.gamma * torch.eye(Z.shape[1])

    def solution(self):
        Z = self.X @ self.H.detach()
        return torch.linalg.solve(self.matrix(), Z.T @ self.t / len(Z))

    def exact(self):
        H, w, n, m = self.H.detach(), self.solution(), len(self.X), len(self.Xv)
        rt, rv = self.X @ H @ w - self.t, self.Xv @ H @ w - self.tv
        q = torch.linalg.solve(self.matrix(), H.T @ self.Xv.T @ rv / m)
        direct = torch.outer(self.Xv.T @ rv / m, w)
        implicit = torch.outer(self.X.T @ rt / n, q) + torch.outer(
            self.X.T @ (self.X @ H @ q) / n, w
        )
        return (direct - implicit).reshape(-1)


class Logistic(Problem):
    """ℓ2-logistic regression, one log-penalty per coordinate; inner solved by Newton.

    H = Xᵀdiag(s(1 − s))X/n + diag e^λ;  ∇_λΦ = −e^λ ∘ w* ∘ H⁻¹∇_wF_val.
    """

    def __init__(self, d=5, n=30, m=20):
        self.w, self.lam = leaves((d,), scale=0.1) + leaves((d,), scale=0.5)
        self.y, self.x = [self.w], [self.lam]
        self.X, self.t = torch.randn(n, d), torch.randint(0, 2, (n,)) * 2.0 - 1
        self.Xv, self.tv = torch.randn(m, d), torch.randint(0, 2, (m,)) * 2.0 - 1

    def train_loss(self):
        fit = F.softplus(-self.t * (self.X @ self.w)).mean()
        return fit + (self.lam.exp() * self.w**2).sum() / 2

    def valid_loss(self):
        return F.softplus(-self.tv * (self.Xv @ self.w)).mean()

    def derivatives(self, w):
        s = torch.sigmoid(-self.t * (self.X @ w))
        penalty = self.lam.detach().exp()
        gradient = -self.X.T @ (s * self.t) / len(s) + penalty * w
        H = self.X.T @ ((s * (1 - s))[:, None] * self.X) / len(s) + torch.diag(penalty)
        return gradient, H

    def solution(self):
        w = torch.zeros_like(self.w)
        for _ in range(50):
            gradient, H = self.derivatives(w)
            w = w - torch.linalg.solve(H, gradient)
        return w

    def exact(self):
        w = self.solution()
        s = torch.sigmoid(-self.tv * (self.Xv @ w))
        gradient = -self.Xv.T @ (s * self.tv) / len(s)
        _, H = self.derivatives(w)
        return -self.lam.detach().exp() * w * torch.linalg.solve(H, gradient)


class Scalar(Problem):
    """g = ½eˣ(y − b)², f = f(y): the true hypergradient is zero at y* = b.

    With h = eˣ, q = 1 − αh: ITD after T steps −αhT q^{T−1}(y₀ − b)f'(y_T); AID by K fixed-point
    steps −q^T(y₀ − b)(1 − q^K)f'(y_T).
    """

    def __init__(self):
        self.y = [torch.tensor(2.0, requires_grad=True)]
        self.x = [torch.tensor(0.3, requires_grad=True)]
        self.b = 0.7

    def train_loss(self):
        return self.x[0].exp() * (self.y[0] - self.b) ** 2 / 2

    def valid_loss(self):
        return torch.sin(self.y[0]) + self.y[0] ** 2

    def solution(self):
        return torch.tensor([self.b])

    def exact(self):
        return torch.zeros(1)
