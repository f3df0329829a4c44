"""Tiny modules that are no transformers models, each with what it is called with and a loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

SIZES = (60, 20, 90)
WIDTH = 8
DENSE = 5


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Tower(nn.Module):
    """A recommender: a table for each field of tokens, a bag, products of all pairs, and networks around these."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(size, WIDTH) for size in SIZES)
        self.history = nn.EmbeddingBag(40, WIDTH, mode="mean", padding_idx=0)
        self.bottom = nn.Sequential(nn.Linear(DENSE, 24), nn.ReLU(), nn.Linear(24, WIDTH), nn.ReLU(inplace=True))
        count = len(SIZES) + 2
        pairs = torch.tril_indices(count, count, -1)
        self.register_buffer("pairs", pairs)
        self.top = nn.Sequential(nn.Linear(WIDTH + pairs.shape[1], 24), nn.ReLU(inplace=True), nn.Linear(24, 1))

    def forward(self, dense: Tensor, tokens: Tensor, bag: Tensor) -> Tensor:
        x = self.bottom(dense)
        fields = [table(tokens[:, place]) for place, table in enumerate(self.tables)]
        z = torch.stack([x, self.history(bag), *fields], dim=1)
        pairs: Any = self.pairs
        return self.top(torch.cat([x, (z @ z.mT)[:, pairs[0], pairs[1]]], dim=1))[:, 0]


def tower(seed: int = 0) -> Tower:
    torch.manual_seed(seed)
    return Tower()


def tower_batch(seed: int = 0, count: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    draw = generator(seed)
    tokens = [torch.randint(0, size, (count,), generator=draw) ** 2 // size for size in SIZES]
    bag = torch.randint(0, 40, (count, 4), generator=draw)
    return torch.randn(count, DENSE, generator=draw), torch.stack(tokens, dim=1), bag


def click_loss(output: Tensor, batch: tuple[Tensor, ...]) -> Tensor:
    return nn.functional.binary_cross_entropy_with_logits(output, (batch[0][:, 0] > 0).float())


class Conditioned(nn.Module):
    """A block whose scales and shifts come from a condition, which it gets by keyword."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.mix = nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)
        self.shifts = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor, *, condition: Tensor, scale: float = 1.0) -> Tensor:
        shift, gain, gate = self.shifts(nn.functional.silu(condition))[:, None].chunk(3, dim=-1)
        y = self.norm(x) * (1 + gain) + shift
        x = x + gate * self.mix(y.flip(1)) * scale
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm(x))))


class Denoiser(nn.Module):
    """A small diffusion transformer: patches by a convolution, a condition of time and label, a stack of blocks."""

    def __init__(self, blocks: int = 5, width: int = 16) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.time = nn.Linear(1, width)
        self.label = nn.Embedding(30, width)
        self.layers = nn.Sequential(*(Conditioned(width) for _ in range(blocks)))
        self.out = nn.Linear(width, 12)

    def forward(self, image: Tensor, time: Tensor, label: Tensor) -> Tensor:
        hidden = self.patches(image).flatten(2).mT
        condition = self.time(time[:, None]) + self.label(label)
        for layer in self.layers:
            hidden = layer(hidden, condition=condition, scale=0.5)
        return self.out(hidden)


def denoiser(seed: int = 0, **options: Any) -> Denoiser:
    torch.manual_seed(seed)
    return Denoiser(**options)


def denoiser_batch(seed: int = 0, count: int = 4) -> dict[str, Tensor]:
    draw = generator(seed)
    return {
        "image": torch.randn(count, 3, 16, 16, generator=draw),
        "time": torch.rand(count, generator=draw),
        "label": torch.randint(0, 30, (count,), generator=draw),
    }


def denoising_loss(output: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return (output - batch["noise"]).square().mean((1, 2))


class Images(nn.Module):
    """A plain network for images: convolutions, a normalization by batches, and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.MaxPool2d(4)
        )
        self.fc1, self.fc2 = nn.Linear(24, 32), nn.Linear(32, 16)
        self.head = self.fc2

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.fc1(self.features(x).flatten(1))))


def images(seed: int = 0) -> Images:
    torch.manual_seed(seed)
    return Images()


def image_batch(seed: int = 0, count: int = 16) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=generator(seed))
