"""Score networks as their users write them, small; program_networks.py gives them by name, with what they take."""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn


def cos_sin(t, dim, period=10_000):
    """The [cos | sin] embedding of DiT, MAR and TabDDPM."""
    frequency = torch.exp(-math.log(period) * torch.arange(dim // 2, dtype=torch.float32, device=t.device) / (dim // 2))
    angle = t[:, None].float() * frequency[None]
    return torch.cat([torch.cos(angle), torch.sin(angle)], dim=-1)


class CosSin(nn.Module):
    """A cos | sin embedding, then Linear, SiLU, Linear."""

    def __init__(self, width, dim=16):
        super().__init__()
        self.dim = dim
        self.mlp = nn.Sequential(nn.Linear(dim, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        return self.mlp(cos_sin(t, self.dim).to(self.mlp[0].weight.dtype))


class MARBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x, y):
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, dim=-1)
        h = self.in_ln(x) * (1 + scale) + shift
        return x + gate * self.mlp(h)


class MARFinal(nn.Module):
    def __init__(self, width, out):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class MARHead(nn.Module):
    """SimpleMLPAdaLN of MAR: predicts [eps, variance]; c is the token's embedding, or one for all."""

    def __init__(self, d=5, width=24, depth=2, cond=7):
        super().__init__()
        self.time_embed, self.cond_embed = CosSin(width), nn.Linear(cond, width)
        self.input_proj = nn.Linear(d, width)
        self.res_blocks = nn.ModuleList(MARBlock(width) for _ in range(depth))
        self.final_layer = MARFinal(width, 2 * d)

    def forward(self, x, t, c=None):
        y = self.time_embed(t)
        if c is not None:
            y = y + self.cond_embed(c)
        x = self.input_proj(x)
        for block in self.res_blocks:
            x = block(x, y)
        return self.final_layer(x, y)


class TabDDPM(nn.Module):
    """MLPDiffusion of TabDDPM: the embedding is added to the projected input; ReLU layers of unequal widths."""

    def __init__(self, d=5, widths=(12, 20, 20, 12), dim_t=16, classes=3):
        super().__init__()
        self.dim_t, self.proj = dim_t, nn.Linear(d, dim_t)
        self.time_embed = nn.Sequential(nn.Linear(dim_t, dim_t), nn.SiLU(), nn.Linear(dim_t, dim_t))
        self.label_emb = nn.Embedding(classes, dim_t)
        sizes = [dim_t, *widths]
        blocks = [nn.Sequential(nn.Linear(a, b), nn.ReLU(), nn.Dropout(0.1)) for a, b in pairwise(sizes)]
        self.blocks, self.head = nn.ModuleList(blocks), nn.Linear(sizes[-1], d)

    def forward(self, x, t, y=None):
        emb = self.time_embed(cos_sin(t, self.dim_t).to(x.dtype))
        if y is not None:
            emb = emb + F.silu(self.label_emb(y))
        x = self.proj(x) + emb
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class TabSynMLP(nn.Module):
    def __init__(self, d=5, dim_t=16):
        super().__init__()
        self.dim_t, self.proj = dim_t, nn.Linear(d, dim_t)
        self.mlp = nn.Sequential(
            *(nn.Linear(dim_t, 2 * dim_t), nn.SiLU(), nn.Linear(2 * dim_t, 2 * dim_t), nn.SiLU()),
            *(nn.Linear(2 * dim_t, dim_t), nn.SiLU(), nn.Linear(dim_t, d)),
        )
        self.time_embed = nn.Sequential(nn.Linear(dim_t, dim_t), nn.SiLU(), nn.Linear(dim_t, dim_t))

    def forward(self, x, noise_labels):
        emb = cos_sin(noise_labels, self.dim_t).to(x.dtype)
        emb = emb.reshape(emb.shape[0], 2, -1).flip(1).reshape(*emb.shape)  # swap sin and cos
        return self.mlp(self.proj(x) + self.time_embed(emb))


class TabSyn(nn.Module):
    """TabSyn's MLP in the preconditioning of EDM: D = c_skip x + c_out F(c_in x, ln(sigma) / 4)."""

    def __init__(self, d=5, sigma_data=0.5):
        super().__init__()
        self.sigma_data, self.denoise_fn_F = sigma_data, TabSynMLP(d)

    def forward(self, x, sigma):
        sigma = sigma.to(x.dtype).reshape(-1, 1)
        c_skip = self.sigma_data**2 / (sigma**2 + self.sigma_data**2)
        c_out = sigma * self.sigma_data / (sigma**2 + self.sigma_data**2).sqrt()
        c_in = 1 / (self.sigma_data**2 + sigma**2).sqrt()
        c_noise = sigma.log() / 4
        return c_skip * x + c_out * self.denoise_fn_F((c_in * x).to(x.dtype), c_noise.flatten())


class VectorFieldMLP(nn.Module):
    """The MLP of sbi: input and condition merged, then layers with time and skip added in place, layer norm last."""

    def __init__(self, d=3, cond=4, width=20, layers=3):
        super().__init__()
        self.input_layer, self.condition_layer = nn.Linear(d, width), nn.Linear(cond, width)
        self.input_merge_layer, self.time_linear_layer = nn.Linear(2 * width, width), nn.Linear(16, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.layers_norm = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))
        self.output_layer, self.activation = nn.Linear(width, d), nn.GELU()

    def forward(self, x, t, condition):
        merged = torch.cat([self.input_layer(x), self.condition_layer(condition)], dim=-1)
        h = self.activation(self.input_merge_layer(self.activation(merged)))
        t_emb = self.time_linear_layer(cos_sin(t, 16).to(x.dtype))
        for layer, norm in zip(self.layers, self.layers_norm):
            h_old = h
            h = self.activation(layer(h))
            h += t_emb
            h += h_old
            h = norm(h)
        return self.output_layer(h)


class AdaBlock(nn.Module):
    def __init__(self, width, cond, ratio=4):
        super().__init__()
        self.ada_ln = nn.Sequential(nn.Linear(cond, width), nn.SiLU(), nn.Linear(width, 3 * width))
        self.block = nn.Sequential(nn.Linear(width, ratio * width), nn.GELU(), nn.Linear(ratio * width, width))

    def forward(self, x, cond):
        shift, scale, gate = self.ada_ln(cond).chunk(3, dim=-1)
        return x + (gate + 1.0) * self.block((scale + 1) * x + shift)


class AdaMLP(nn.Module):
    """The adaptive MLP of sbi: no norm; shift, scale and gate from time and condition together."""

    def __init__(self, d=3, cond=4, width=20, layers=3):
        super().__init__()
        self.global_mlp = nn.Sequential(nn.Linear(16 + cond, width), nn.GELU(), nn.Linear(width, width))
        blocks = [AdaBlock(width, width) for _ in range(layers)]
        self.layers = nn.ModuleList([nn.Linear(d, width), *blocks, nn.Linear(width, d)])

    def forward(self, x, t, condition):
        emb = self.global_mlp(torch.cat([condition.expand(t.shape[0], -1), cos_sin(t, 16).to(x.dtype)], dim=-1))
        h = self.layers[0](x)
        for layer in self.layers[1:-1]:
            h = layer(h, emb)
        return self.layers[-1](h)


class ScoreModelsMLP(nn.Module):
    """The MLP of score_models: Gaussian Fourier features through SiLU layers, concatenated to x; score over sigma."""

    def __init__(self, d=5, width=20, fourier=16):
        super().__init__()
        self.register_buffer("W", 30 * torch.randn(fourier // 2))
        self.temb = nn.Sequential(nn.Linear(fourier, fourier), nn.SiLU(), nn.Linear(fourier, fourier), nn.SiLU())
        self.layers = nn.ModuleList(nn.Linear(*io) for io in ((d + fourier, width), (width, width), (width, width)))
        self.output_layer, self.act = nn.Linear(width, d), nn.SiLU()

    def forward(self, x, t):
        angle = 2 * math.pi * torch.einsum("...i,j->...ij", t.to(self.W.dtype), self.W)
        temb = self.temb(torch.cat([angle.sin(), angle.cos()], dim=1))
        h = self.layers[0](torch.cat([x, temb], dim=1))
        for layer in self.layers[1:]:
            h = self.act(layer(h))
        sigma = 0.01 * (50 / 0.01) ** t
        return self.output_layer(h) / sigma.view(-1, 1)


class SmallDiffusion(nn.Module):
    """TimeInputMLP of smalldiffusion: log sigma / 2 as sin and cos beside x; a bottle of GELU layers."""

    def __init__(self, d=2, hidden=(16, 32, 48, 32, 16)):
        super().__init__()
        layers = []
        for a, b in zip((d + 2, *hidden), hidden):
            layers += [nn.Linear(a, b), nn.GELU()]
        self.net = nn.Sequential(*layers, nn.Linear(hidden[-1], d))

    def forward(self, x, sigma):
        log_sigma = torch.log(sigma.reshape(-1, 1)) / 2
        embedding = torch.cat([torch.sin(log_sigma), torch.cos(log_sigma)], dim=1).to(x.dtype)
        return self.net(torch.cat([x, embedding], dim=1))


class DPPO(nn.Module):
    """DiffusionMLP of DPPO: action chunk, time and observation concatenated, three ReLU layers."""

    def __init__(self, shape=(2, 3), obs=4, width=32, residual=False):
        super().__init__()
        d = math.prod(shape)
        self.time_embedding = nn.Sequential(nn.Linear(16, 32), nn.Mish(), nn.Linear(32, 16))
        if residual:
            self.mlp_mean = ResidualMish(d + 16 + obs, width, d)
        else:
            layers = (nn.Linear(d + 16 + obs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
            self.mlp_mean = nn.Sequential(*layers, nn.Linear(width, width), nn.ReLU(), nn.Linear(width, d))

    def forward(self, x, time, state):
        batch, horizon, action = x.shape
        x = x.view(batch, -1)
        time_emb = self.time_embedding(cos_sin(time.view(batch), 16).to(x.dtype))
        return self.mlp_mean(torch.cat([x, time_emb, state.view(batch, -1)], dim=-1)).view(batch, horizon, action)


class TwoLayerPreActivation(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.l1, self.l2, self.act = nn.Linear(width, width), nn.Linear(width, width), nn.Mish()

    def forward(self, x):
        skip = x
        x = self.l1(self.act(x))
        return self.l2(self.act(x)) + skip


class ResidualMish(nn.Module):
    """ResidualMLP of DPPO: pairs of pre-activation layers around the identity."""

    def __init__(self, d_in, width, d_out):
        super().__init__()
        layers = [nn.Linear(d_in, width), *(TwoLayerPreActivation(width) for _ in range(2)), nn.Linear(width, d_out)]
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class IDQLBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x):
        return x + self.fc2(F.mish(self.fc1(self.norm(self.dropout(x)))))


class IDQL(nn.Module):
    """LN_Resnet of IDQL: learned Fourier features of time, concatenation, three residual blocks."""

    def __init__(self, d=3, obs=4, width=16):
        super().__init__()
        self.kernel = nn.Parameter(0.2 * torch.randn(8, 1))
        self.cond = nn.Sequential(nn.Linear(16, 32), nn.Mish(), nn.Linear(32, 16))
        self.inp = nn.Linear(d + 16 + obs, width)
        self.blocks, self.out = nn.ModuleList(IDQLBlock(width) for _ in range(3)), nn.Linear(width, d)

    def forward(self, a, t, s):
        f = 2 * torch.pi * t.to(a.dtype)[:, None] @ self.kernel.T
        h = self.inp(torch.cat([a, s, self.cond(torch.cat([f.cos(), f.sin()], -1))], dim=-1))
        for block in self.blocks:
            h = block(h)
        return self.out(F.mish(h))


class Swish(nn.Module):
    def forward(self, x):
        return torch.sigmoid(x) * x


class FlowMatchingExample(nn.Module):
    """The velocity network of the flow_matching examples: time concatenated, its own Swish."""

    def __init__(self, d=2, width=24):
        super().__init__()
        layers = [nn.Linear(d + 1, width), Swish()]
        for _ in range(3):
            layers += [nn.Linear(width, width), Swish()]
        self.input_dim, self.main = d, nn.Sequential(*layers, nn.Linear(width, d))

    def forward(self, x, t):
        sz = x.size()
        x = x.reshape(-1, self.input_dim)
        t = t.reshape(-1, 1).float().expand(x.shape[0], 1).to(x.dtype)
        return self.main(torch.cat([x, t], dim=1)).reshape(*sz)


class TorchCFM(nn.Module):
    """The MLP of torchcfm: 3 x 64 SELU, time concatenated by the caller."""

    def __init__(self, d=2, width=24):
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Linear(d + 1, width), nn.SELU(), nn.Linear(width, width), nn.SELU()),
            *(nn.Linear(width, width), nn.SELU(), nn.Linear(width, d)),
        )

    def forward(self, x, t):
        return self.net(torch.cat([x, t[:, None]], -1))


class SuperDiffusion(nn.Module):
    """The MLP of super-diffusion: [t, x] through SiLU layers, no biases in the first."""

    def __init__(self, d=2, width=24):
        super().__init__()
        layers = [nn.Linear(d + 1, width, bias=False), nn.SiLU()]
        for _ in range(3):
            layers += [nn.Linear(width, width), nn.SiLU(inplace=True)]
        self.model = nn.Sequential(*layers, nn.Linear(width, d))

    def forward(self, x, t):
        return self.model(torch.hstack([t.view(-1, 1), x]))


class ConcatSquash(nn.Module):
    """The network of diffrax' continuous normalizing flow: Linear(x) * sigmoid(gate(t)) + bias(t), tanh between."""

    def __init__(self, d=2, width=24):
        super().__init__()
        sizes = [(d, width), (width, width), (width, d)]
        self.lin1 = nn.ModuleList(nn.Linear(*io) for io in sizes)
        self.lin2 = nn.ModuleList(nn.Linear(1, io[1]) for io in sizes)
        self.lin3 = nn.ModuleList(nn.Linear(1, io[1], bias=False) for io in sizes)

    def forward(self, y, t):
        t = t[:, None]
        for i, (lin1, lin2, lin3) in enumerate(zip(self.lin1, self.lin2, self.lin3)):
            y = lin1(y) * torch.sigmoid(lin2(t)) + lin3(t)
            if i < 2:
                y = torch.tanh(y)
        return y


class FiLMELU(nn.Module):
    """FiLM after ELU layers, an output times a gate plus x: what is left of the grammar, with addmm and softplus."""

    def __init__(self, shape=(2, 2, 3), width=20):
        super().__init__()
        d = math.prod(shape)
        self.film = nn.Linear(1, 2 * width)
        self.weight, self.bias = nn.Parameter(torch.randn(d, width) / 3), nn.Parameter(torch.randn(width) / 3)
        self.mid, self.out = nn.Linear(width, width), nn.Linear(width, 2 * d)
        self.register_buffer("mean", torch.randn(shape))

    def forward(self, x, t):
        scale, shift = self.film(t[:, None]).tensor_split(2, dim=1)
        h = torch.addmm(self.bias, (x - self.mean).flatten(1), self.weight)
        h = F.softplus(self.mid(F.elu(h) * (1 + scale) - shift))
        out = self.out(F.gelu(h, approximate="tanh")).unflatten(1, (2 * x.shape[1], *x.shape[2:]))
        return out[:, : x.shape[1]] + 0.5 * x / (1 + t).view(-1, 1, 1, 1)
