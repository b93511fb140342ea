"""Data, references and networks for tests of kernels."""

import torch
from agreement import exact_normal

from fastscore import Reference
from fastscore.ops import noise
from fastscore.ops.instructions import Act, Add, Affine, Linear, Norm, Save
from fastscore.ops.interpreting import interpreting

DEVICE = torch.device("cpu" if interpreting() else "cuda")


class Case:
    """Random data, noise words and coefficients, float64, for B samples, R rows and d dimensions."""

    def __init__(self, b, r, d, seed=0):
        self.b, self.r, self.d = b, r, d
        self.generator = torch.Generator().manual_seed(1000 * b + 10 * r + d + seed)
        self.x = self.randn(b, d).float().double()
        self.keys = noise.sample_keys("independent", 3, torch.arange(b, device=DEVICE) + 7, d)
        self.points = noise.points("independent", 3, range(r), r, d, DEVICE)
        self.sign = torch.where(torch.arange(r, device=DEVICE) % 2 == 0, 1.0, -1.0).double()
        log_snr = torch.linspace(-6, 6, r, dtype=torch.float64, device=DEVICE)
        self.alpha, self.sigma = torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()
        self.a, self.b_, self.c = self.randn(r), self.randn(r), self.randn(r)
        self.eps = exact_normal(noise.combine(self.keys, self.points)) * self.sign[:, None]
        self.x_t = self.alpha[:, None] * self.x[:, None] + self.sigma[:, None] * self.eps

    def randn(self, *shape):
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64).to(DEVICE)

    @property
    def rows(self):
        return torch.stack([self.sign, self.alpha, self.sigma, self.a, self.b_, self.c], 1)

    def reference(self, kind, components=5):
        self.generator.manual_seed(components + self.d)
        k = components if "mixture" in kind else 1
        weight, mean = self.randn(k).softmax(0), self.randn(k, self.d)
        variance = (self.randn(k, self.d) - 0.5).exp()
        if kind == "isotropic":
            return Reference.isotropic(1.3).to(DEVICE)
        basis = torch.linalg.qr(self.randn(k, self.d, self.d))[0] if "full" in kind else None
        return Reference(weight, mean, variance, basis).to(DEVICE)


def adaln(case, width, depth, name="silu"):
    """Pre-norm residual blocks whose modulation comes per draw, per sample, per pair and for all alike."""
    b, r, h = case.b, case.r, width
    weights, tables = [case.randn(h, case.d) / case.d**0.5], [0.3 * case.randn(1, r, h)]
    code = [Linear(0), Affine(-1, 0)]
    for layer in range(depth):
        n = len(tables)
        weights.append(case.randn(h, h) / h**0.5)
        tables += [1 + 0.2 * case.randn(1, r, h), 0.2 * case.randn(b, r, h)]
        tables += [1 + 0.2 * case.randn(b, 1, h), 0.1 * case.randn(1, 1, h)]
        code += [Save(1), Norm(1e-6), Affine(n, n + 1), Act(name), Linear(layer + 1), Affine(n + 2, n + 3), Add(1)]
    weights.append(case.randn(case.d, h) / h**0.5)
    tables.append(0.1 * case.randn(1, 1, case.d))
    return [*code, Act(name), Linear(depth + 1), Affine(-1, len(tables) - 1)], weights, tables


def edm(case, width, depth, name="gelu"):
    """Unequal widths between c_in x_t and c_skip x_t + c_out F, with scales after a sum."""
    d, r = case.d, case.r
    weights, tables = [case.randn(width, d) / d**0.5], [case.randn(1, r, 1), case.randn(1, r, d)]
    code = [Save(0), Affine(0, 1), Linear(0)]
    for layer in range(depth):
        wide = width if layer % 2 else max(1, width - 5)
        weights.append(case.randn(wide, weights[-1].shape[0]) / width**0.5)
        tables.append(0.1 * case.randn(1, 1, wide))
        code += [Act(name), Linear(layer + 1), Affine(-1, len(tables) - 1)]
    weights.append(case.randn(d, weights[-1].shape[0]) / width**0.5)
    n = len(tables)
    tables += [case.randn(1, r, 1), case.randn(1, r, d), case.randn(1, r, 1), case.randn(1, 1, d)]
    return [*code, Act(name), Linear(depth + 1), Affine(n, n + 1), Add(0, n + 2), Affine(n + 3, -1)], weights, tables


def waiting(case, width, depth, name="silu"):
    """A tile saved before equal layers, one that each of them adds, and one that waits for all of them."""
    weights, tables = [case.randn(width, case.d) / case.d**0.5], [0.3 * case.randn(1, case.r, width)]
    code = [Linear(0), Affine(-1, 0), Save(0), Act(name), Save(1)]
    for layer in range(depth):
        weights.append(case.randn(width, width) / width**0.5)
        tables.append(0.1 * case.randn(1, 1, width))
        code += [Linear(layer + 1), Affine(-1, layer + 1), Act(name), Add(0)]
    weights.append(case.randn(case.d, width) / width**0.5)
    return [*code, Add(1), Linear(depth + 1)], weights, tables


def both(case, width, depth, name="silu"):
    """Equal layers that read a tile saved before them and save another of their own."""
    code, weights, tables = waiting(case, width, depth, name)
    inside = [op for k in range(depth) for op in (Save(1), *code[5 + 4 * k : 9 + 4 * k], Add(1))]
    return [*code[:4], *inside, code[-1]], weights, tables


def bare(case, width, depth, name="silu"):
    """Equal layers without biases: a loop that reads no vector."""
    shapes = (width, case.d), *[(width, width)] * depth, (case.d, width)
    weights = [case.randn(*shape) / shape[1] ** 0.5 for shape in shapes]
    return [Linear(0), *[op for k in range(1, depth + 2) for op in (Act(name), Linear(k))]], weights, []


def skip(case, width, depth, name="silu"):
    """x_t plus a network without biases: no table at all."""
    weights = [case.randn(width, case.d) / case.d**0.5, case.randn(case.d, width) / width**0.5]
    return [Save(0), Linear(0), Act(name), Linear(1), Add(0)], weights, []
