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
    """Sizes of a demo model; the defaults are those of "xs".

    The last layer is the only one with full attention (`nope_interval` is `layers`): what it sees
    of a token then depends on the token's chunk alone, which the training on long texts uses
    (data.py), and a prompt of any length costs time in proportion to it.
    """

    vocabulary: int = 1024
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    experts: int = 4
    width: int = 192  # of each expert and of the shared expert
    chunk: int = 256
    floor_scale: int = 256
    attn_scale: float = 0.3
    rope_theta: float = 10000.0
    image_size: int = 56
    patch: int = 7
    vision_hidden: int = 96
    vision_layers: int = 2
    vision_heads: int = 4
    vision_output: int = 128

    @property
    def nope_interval(self) -> int:
        """Of config.json: each so many layers, one has full attention."""
        return self.layers

    @property
    def tile_tokens(self) -> int:
        """Places of a tile in the text: four patches each."""
        return self.grid**2 // 4

    @property
    def grid(self) -> int:
        """Patches along a side of a tile."""
        return self.image_size // self.patch


SHAPES = {
    "xs": Shape(),
    "s": Shape(
        hidden=256,
        layers=8,
        head_dim=64,
        experts=16,
        width=128,
        image_size=112,
        patch=14,
        vision_hidden=192,
        vision_layers=4,
        vision_output=256,
    ),
}


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Turns interleaved pairs of the last dimension by complex numbers that broadcast to them."""
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns).flatten(-2)


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
    """Grouped-query attention: chunked with RoPE or, in the last layer, full without."""

    def __init__(self, shape: Shape, index: int):
        super().__init__()
        self.shape = shape
        self.full = index == shape.layers - 1
        size, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden, size, bias=False)
        self.k_proj = nn.Linear(shape.hidden, kv, bias=False)
        self.v_proj = nn.Linear(shape.hidden, kv, bias=False)
        self.o_proj = nn.Linear(size, shape.hidden, bias=False)

    def forward(self, x: Tensor, places: Places) -> Tensor:
        """[B, T, hidden] to the same shape; with `places.repeats`, only the wanted rows count."""
        shape = self.shape
        batch, length, _ = x.shape
        q = self.q_proj(x).view(batch, length, shape.heads, shape.head_dim)
        k = self.k_proj(x).view(batch, length, shape.kv_heads, shape.head_dim)
        v = self.v_proj(x).view(batch, length, shape.kv_heads, shape.head_dim)
        if self.full:
            y = self._everywhere(q * places.temperature[..., None, None], k, v, places)
        else:
            y = self._chunked(rms(rotate(q, places.turns)), rms(rotate(k, places.turns)), v)
        return self.o_proj(y.reshape(batch, length, -1))

    def _everywhere(self, q: Tensor, k: Tensor, v: Tensor, places: Places) -> Tensor:
        q, k, v = (y.transpose(1, 2) for y in (q, *self._grouped(k, v)))
        if places.repeats is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        # Only a few rows are wanted: the last ones of each sequence.
        rows = places.wanted.nonzero()
        scores = (q[rows[:, 0], :, rows[:, 1]][:, :, None] @ k[rows[:, 0]].mT).squeeze(2)
        scores = scores * self.shape.head_dim**-0.5 + places.repeats.log()[rows[:, 0]][:, None]
        later = torch.arange(k.shape[2], device=k.device) > rows[:, 1:]
        weights = scores.masked_fill(later[:, None], -torch.inf).softmax(-1)
        found = (weights[:, :, None] @ v[rows[:, 0]]).squeeze(2)
        y = torch.zeros_like(q.transpose(1, 2))
        return y.index_put((rows[:, 0], rows[:, 1]), found.to(y.dtype))

    def _chunked(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # Chunks are sequences of their own; what fills up the last one comes after all queries.
        batch, length = q.shape[:2]
        chunk = min(self.shape.chunk, length)
        missing = -length % chunk

        def cut(y: Tensor) -> Tensor:
            y = F.pad(y, (0, 0, 0, 0, 0, missing)) if missing else y
            return y.reshape(-1, chunk, *y.shape[2:]).transpose(1, 2)

        q, k, v = (cut(y) for y in (q, *self._grouped(k, v)))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        return y.reshape(batch, length + missing, *y.shape[2:])[:, :length]

    def _grouped(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        groups = self.shape.heads // self.shape.kv_heads
        return k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)


class Places:
    """What the text layers must know of the positions: angles, temperature, and what is wanted.

    Attributes:
        turns: RoPE as complex numbers [T, 1, D / 2].
        temperature: Of the queries of full attention, [T] or [B, T].
        wanted: [B, T]: the rows whose logits are wanted; None for all.
        repeats: [B, T]: how often each key counts in full attention; None for once.
    """

    def __init__(
        self,
        shape: Shape,
        length: int,
        device: torch.device,
        *,
        wanted: Tensor | None = None,
        repeats: Tensor | None = None,
        positions: Tensor | None = None,
    ):
        position = torch.arange(length, device=device)
        pairs = torch.arange(0, shape.head_dim, 2, device=device, dtype=torch.float64)
        frequency = shape.rope_theta ** (-pairs / shape.head_dim)
        angle = (position % shape.chunk).double()[:, None, None] * frequency
        self.turns = torch.polar(torch.ones_like(angle), angle).to(torch.complex64)
        far = position if positions is None else positions
        steps = ((far + 1) // shape.floor_scale).double()
        self.temperature = (1 + shape.attn_scale * steps.log1p()).float()
        self.wanted, self.repeats = wanted, repeats


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

    def forward(self, x: Tensor, wanted: Tensor | None = None) -> Tensor:
        """[B, T, hidden] to the same shape, or to [wanted rows, hidden]; keeps balance and load."""
        rows = x.reshape(-1, x.shape[-1])
        logits = self.router(rows)
        top, chosen = logits.max(-1)
        counts = torch.bincount(chosen, minlength=self.shape.experts)
        # Switch Transformer's balance loss (Fedus et al. 2021), and a z-loss on the logits.
        share = torch.softmax(logits, -1).mean(0)
        balance = self.shape.experts * (share * (counts / counts.sum())).sum()
        self.balance_loss = balance + 0.1 * logits.logsumexp(-1).pow(2).mean()
        self.load = counts.detach()
        if wanted is not None:
            x = rows = x[wanted]
            top, chosen = top[wanted.flatten()], chosen[wanted.flatten()]
            counts = torch.bincount(chosen, minlength=self.shape.experts)
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

    def forward(self, x: Tensor, places: Places, last: bool) -> Tensor:
        """[B, T, hidden] to the same shape; the last layer computes the wanted rows only."""
        x = x + self.attention(self.input_norm(x), places)
        if not last or places.wanted is None:
            return x + self.experts(self.post_norm(x))
        return x[places.wanted] + self.experts(self.post_norm(x), places.wanted)


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

    def forward(self, h: Tensor, turns: Tensor) -> Tensor:
        """[tiles, patches + 1, size] to the same shape."""
        tiles, tokens, size = h.shape
        x = self.input_norm(h)

        def heads(y: Tensor) -> Tensor:
            return y.view(tiles, tokens, self.heads, size // self.heads).transpose(1, 2)

        q, k = rotate(heads(self.q_proj(x)), turns), rotate(heads(self.k_proj(x)), turns)
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
        turns = torch.polar(torch.ones_like(angle), angle).to(torch.complex64)
        self.register_buffer("turns", turns, persistent=False)

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
            h = block(h, self.turns)
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

    def forward(
        self,
        ids: Tensor,
        pixels: Tensor | None = None,
        wanted: Tensor | None = None,
        repeats: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, T, V], or [wanted rows, V]; see Places for the arguments."""
        x = self.embedding(ids)
        if pixels is not None:
            rows = self.vision(pixels).reshape(-1, x.shape[-1])
            x = x.masked_scatter((ids == self.patch_token)[..., None], rows.to(x.dtype))
        places = Places(
            self.shape,
            ids.shape[1],
            ids.device,
            wanted=wanted,
            repeats=repeats,
            positions=positions,
        )
        for i, block in enumerate(self.blocks):
            x = block(x, places, last=i == len(self.blocks) - 1)
        return self.head(self.norm(x))

    def balance_loss(self) -> Tensor:
        """Mean over the layers, of the last pass."""
        return torch.stack([torch.as_tensor(b.experts.balance_loss) for b in self.blocks]).mean()
