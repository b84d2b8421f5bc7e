"""Llama 4 in plain PyTorch, for training.

The mathematics is that of `transformers`; the expert dispatch is not: it computes each token in the
expert that was chosen for it, not in all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """Sizes of the demo model."""

    vocabulary: int = 704
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    experts: int = 4
    width: int = 192  # of each expert and of the shared expert
    chunk: int = 256
    nope_interval: int = 4
    floor_scale: int = 256
    attn_scale: float = 0.1
    rope_theta: float = 10000.0
    image_size: int = 56
    patch: int = 7
    vision_hidden: int = 96
    vision_layers: int = 2
    vision_heads: int = 4
    vision_output: int = 128

    @property
    def grid(self) -> int:
        """Patches along a side of a tile."""
        return self.image_size // self.patch


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns interleaved pairs of the last dimension; cos, sin [T, D / 2] against x [..., T, D]."""
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)


def rms(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Divides the last dimension by its root mean square."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


class Norm(nn.Module):
    """RMSNorm."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """[.., size] to the same shape."""
        return rms(x) * self.weight


class Attention(nn.Module):
    """Grouped-query attention: chunked with RoPE or, each nope_interval-th layer, full without."""

    def __init__(self, shape: Shape, index: int):
        super().__init__()
        self.shape = shape
        self.full = (index + 1) % shape.nope_interval == 0
        size, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden, size, bias=False)
        self.k_proj = nn.Linear(shape.hidden, kv, bias=False)
        self.v_proj = nn.Linear(shape.hidden, kv, bias=False)
        self.o_proj = nn.Linear(size, shape.hidden, bias=False)

    def forward(self, x: Tensor, places: Places) -> Tensor:
        """[B, T, hidden] to the same shape."""
        shape = self.shape
        batch, length, _ = x.shape

        def heads(y: Tensor, count: int) -> Tensor:
            return y.view(batch, length, count, shape.head_dim).transpose(1, 2)

        q, k = heads(self.q_proj(x), shape.heads), heads(self.k_proj(x), shape.kv_heads)
        v = heads(self.v_proj(x), shape.kv_heads)
        if self.full:
            q = q * places.temperature[:, None]
        else:
            q, k = rms(rotate(q, places.cos, places.sin)), rms(rotate(k, places.cos, places.sin))
        groups = shape.heads // shape.kv_heads
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        mask = places.causal if self.full else places.chunked
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o_proj(y.transpose(1, 2).reshape(batch, length, -1))


class Places:
    """What depends on positions 0..length-1 only: RoPE tables, temperature, masks."""

    def __init__(self, shape: Shape, length: int, device: torch.device):
        position = torch.arange(length, device=device)
        pairs = torch.arange(0, shape.head_dim, 2, device=device, dtype=torch.float64)
        frequency = shape.rope_theta ** (-pairs / shape.head_dim)
        angle = (position % shape.chunk).double()[:, None] * frequency
        self.cos, self.sin = angle.cos().float(), angle.sin().float()
        steps = ((position + 1) // shape.floor_scale).double()
        self.temperature = (1 + shape.attn_scale * steps.log1p()).float()
        self.causal = position[:, None] >= position[None, :]
        chunk = position // shape.chunk
        self.chunked = self.causal & (chunk[:, None] == chunk[None, :])


class Experts(nn.Module):
    """Top-1 routed experts, their input scaled by the router's sigmoid, and a shared expert."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        hidden, width = shape.hidden, shape.width
        self.router = nn.Linear(hidden, shape.experts, bias=False)
        self.gate_up = nn.Parameter(torch.randn(shape.experts, hidden, 2 * width) * hidden**-0.5)
        self.down = nn.Parameter(torch.randn(shape.experts, width, hidden) * width**-0.5 * 0.5)
        self.shared_gate_up = nn.Linear(hidden, 2 * width, bias=False)
        self.shared_down = nn.Linear(width, hidden, bias=False)
        self.balance_loss: Tensor | float = 0.0
        self.load: Tensor | None = None  # tokens per expert in the last pass

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, hidden] to the same shape; keeps `balance_loss` and `load`."""
        rows = x.reshape(-1, x.shape[-1])
        logits = self.router(rows)
        top, chosen = logits.max(-1)
        counts = torch.bincount(chosen, minlength=self.shape.experts)
        # Switch Transformer's balance loss (Fedus et al. 2021), and a z-loss on the logits.
        share = torch.softmax(logits, -1).mean(0)
        balance = self.shape.experts * (share * (counts / counts.sum())).sum()
        self.balance_loss = balance + 0.1 * logits.logsumexp(-1).pow(2).mean()
        self.load = counts.detach()
        order = chosen.argsort()
        scaled = (rows * torch.sigmoid(top)[:, None])[order]
        parts, first = [], 0
        for expert, count in enumerate(counts.tolist()):
            gate, up = (scaled[first : first + count] @ self.gate_up[expert]).chunk(2, -1)
            parts.append((F.silu(gate) * up) @ self.down[expert])
            first += count
        routed = torch.zeros_like(scaled).index_copy(0, order, torch.cat(parts))
        gate, up = self.shared_gate_up(rows).chunk(2, -1)
        return (routed + self.shared_down(F.silu(gate) * up)).view_as(x)


class Block(nn.Module):
    """One text layer."""

    def __init__(self, shape: Shape, index: int):
        super().__init__()
        self.input_norm, self.post_norm = Norm(shape.hidden), Norm(shape.hidden)
        self.attention, self.experts = Attention(shape, index), Experts(shape)

    def forward(self, x: Tensor, places: Places) -> Tensor:
        """[B, T, hidden] to the same shape."""
        x = x + self.attention(self.input_norm(x), places)
        return x + self.experts(self.post_norm(x))


class VisionBlock(nn.Module):
    """One vision layer: attention within a tile with 2-D RoPE, and a GELU MLP."""

    def __init__(self, shape: Shape):
        super().__init__()
        size = shape.vision_hidden
        self.heads = shape.vision_heads
        self.input_norm, self.post_norm = nn.LayerNorm(size, 1e-5), nn.LayerNorm(size, 1e-5)
        self.q_proj, self.k_proj = nn.Linear(size, size), nn.Linear(size, size)
        self.v_proj, self.o_proj = nn.Linear(size, size), nn.Linear(size, size)
        self.fc1, self.fc2 = nn.Linear(size, 4 * size), nn.Linear(4 * size, size)

    def forward(self, h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[tiles, patches + 1, size] to the same shape."""
        tiles, tokens, size = h.shape
        x = self.input_norm(h)

        def heads(y: Tensor) -> Tensor:
            return y.view(tiles, tokens, self.heads, size // self.heads).transpose(1, 2)

        q, k = rotate(heads(self.q_proj(x)), cos, sin), rotate(heads(self.k_proj(x)), cos, sin)
        y = F.scaled_dot_product_attention(q, k, heads(self.v_proj(x)))
        h = h + self.o_proj(y.transpose(1, 2).reshape(tiles, tokens, size))
        return h + self.fc2(F.gelu(self.fc1(self.post_norm(h))))


class Vision(nn.Module):
    """Tiles [N, 3, S, S] to rows [N, grid^2 / 4, hidden]."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        size, grid = shape.vision_hidden, shape.grid
        self.patch_embedding = nn.Linear(3 * shape.patch**2, size, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(size) * 0.1)
        self.positions = nn.Parameter(torch.randn(grid * grid + 1, size) * 0.1)
        self.pre_norm, self.post_norm = nn.LayerNorm(size, 1e-5), nn.LayerNorm(size, 1e-5)
        self.blocks = nn.ModuleList(VisionBlock(shape) for _ in range(shape.vision_layers))
        # The adapter takes four patches side by side; transformers names this width the
        # intermediate_size of the vision tower.
        self.adapter_fc1 = nn.Linear(4 * size, shape.vision_output, bias=False)
        self.adapter_fc2 = nn.Linear(shape.vision_output, shape.vision_output, bias=False)
        self.projector = nn.Linear(shape.vision_output, shape.hidden, bias=False)
        pairs = size // shape.vision_heads // 2
        frequency = 10000.0 ** (-2 * torch.arange(pairs // 2, dtype=torch.float64) / pairs)
        place = torch.arange(grid * grid)
        columns = (place % grid + 1).double()[:, None] * frequency
        rows = (place // grid + 1).double()[:, None] * frequency
        angle = torch.cat(
            (torch.cat((columns, rows), 1), torch.zeros(1, pairs, dtype=torch.float64))
        )
        self.register_buffer("cos", angle.cos().float(), persistent=False)
        self.register_buffer("sin", angle.sin().float(), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised pixels to the rows that stand at the places of the picture."""
        shape = self.shape
        tiles, grid, size = pixels.shape[0], shape.grid, shape.vision_hidden
        patches = pixels.view(tiles, 3, grid, shape.patch, grid, shape.patch)
        patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(tiles, grid * grid, -1)
        h = self.patch_embedding(patches)
        h = torch.cat((h, self.class_embedding.expand(tiles, 1, size)), 1) + self.positions
        h = self.pre_norm(h)
        for block in self.blocks:
            h = block(h, self.cos, self.sin)
        h = self.post_norm(h)[:, :-1]
        h = h.view(tiles, grid // 2, 2, grid // 2, 2, size).transpose(2, 3)
        h = h.reshape(tiles, (grid // 2) ** 2, 4 * size)
        h = F.gelu(self.adapter_fc2(F.gelu(self.adapter_fc1(h))))
        return self.projector(h)


class DemoModel(nn.Module):
    """Ids [B, T] and tiles [N, 3, S, S], in the order of their places, to logits [B, T, V]."""

    def __init__(self, shape: Shape, patch_token: int):
        super().__init__()
        self.shape, self.patch_token = shape, patch_token
        self.embedding = nn.Embedding(shape.vocabulary, shape.hidden)
        self.blocks = nn.ModuleList(Block(shape, i) for i in range(shape.layers))
        self.norm = Norm(shape.hidden)
        self.head = nn.Linear(shape.hidden, shape.vocabulary, bias=False)
        self.vision = Vision(shape)
        nn.init.normal_(self.embedding.weight, 0, 0.5)
        nn.init.normal_(self.head.weight, 0, 0.02)

    def forward(self, ids: Tensor, pixels: Tensor | None) -> Tensor:
        """Logits for every position."""
        x = self.embedding(ids)
        if pixels is not None:
            rows = self.vision(pixels).reshape(-1, x.shape[-1])
            x = x.masked_scatter((ids == self.patch_token)[..., None], rows)
        places = Places(self.shape, ids.shape[1], ids.device)
        for block in self.blocks:
            x = block(x, places)
        return self.head(self.norm(x))

    def balance_loss(self) -> Tensor:
        """Mean over the layers, of the last pass."""
        return torch.stack([torch.as_tensor(b.experts.balance_loss) for b in self.blocks]).mean()
