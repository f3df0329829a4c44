"""How far blocks turn the hidden state, where it is not one vector for each of some tokens."""

from __future__ import annotations

import torch
from torch import nn

from cur.integrations import collect


class Turn(nn.Module):
    """Rotate pairs of channels by a share of half a turn; perhaps halve the size of the image before."""

    def __init__(self, share: float, *, first: bool, halve: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        angle = torch.tensor(torch.pi * share)
        pair = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).reshape(2, 2)
        self.linear = nn.Linear(4, 4, bias=False)
        self.linear.weight.data = torch.block_diag(pair, pair)
        self.first, self.halve = first, halve

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x[:, :, ::2, ::2] if self.first and self.halve else x
        y: torch.Tensor = self.linear(x.movedim(1, -1) if self.first else x)
        return y.movedim(-1, 1) if self.first else y


def test_channels_may_come_first_or_last() -> None:
    x = torch.randn(3, 4, 6, 12, generator=torch.Generator().manual_seed(0))
    for first, image in ((True, x), (False, x.movedim(1, -1))):
        net = nn.Sequential(*[Turn(share, first=first) for share in (0.1, 0.25, 0.4)])
        found = collect(net, [image], modules=["0.linear"], layers=["0", "1", "2"])
        assert torch.tensor(list(found.angular.values())).allclose(torch.tensor([0.1, 0.25, 0.4]), atol=1e-6)


def test_a_block_that_changes_the_shape_has_the_largest_distance() -> None:
    net = nn.Sequential(Turn(0.1, first=True), Turn(0.0, first=True, halve=True), Turn(0.3, first=True))
    x = torch.randn(3, 4, 6, 12, generator=torch.Generator().manual_seed(0))
    found = collect(net, [x[:2], x[2:]], modules=["0.linear"], layers=["0", "1", "2"])
    assert torch.tensor(list(found.angular.values())).allclose(torch.tensor([0.1, 1.0, 0.3]), atol=1e-6)
    assert found.angular_spans(2) == {0: 1.0, 1: 1.0}
    assert found.angles is not None
    assert found.angles.diagonal().tolist() == [0.0] * 4
