"""Tables that keep whole rows on a grid, and layers that read what they store."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

from cur.integrations.nn import EmbeddingFactors, GridEmbedding, IntegerGrid, WholeLinear, WholeTable, swap_, tied_to
from cur.integrations.nn.lookup import ScaledEmbedding, Times, times_of
from cur.integrations.nn.table import reading

N, M = 20, 16
GRIDS = [IntegerGrid(), IntegerGrid(6, 8, symmetric=False), IntegerGrid(4, 8, symmetric=True)]


def rows(grid: IntegerGrid) -> GridEmbedding:
    generator = torch.Generator().manual_seed(0)
    most = 2 ** (grid.bits - 1) - 1
    low, high = (-most, most) if grid.symmetric else (0, 2 * most + 1)
    integers = torch.randint(low, high + 1, (N, M), generator=generator)
    steps = (torch.rand(N, grid.groups(M), generator=generator) + 0.5).half().float()
    zeros = None
    if not grid.symmetric:
        zeros = torch.randint(0, high + 1, (N, grid.groups(M)), generator=generator)
    kind = torch.int8 if grid.symmetric else torch.uint8
    return GridEmbedding.from_integers(integers.to(kind), steps, zeros=zeros, grid=grid)


class Tied(nn.Module):
    """A model of a table and a head that share a weight."""

    def __init__(self, *, bias: bool = False, head_first: bool = False) -> None:
        super().__init__()
        if head_first:
            self.head = nn.Linear(M, N, bias=bias)
        self.table = nn.Embedding(N, M, padding_idx=1)
        if not head_first:
            self.head = nn.Linear(M, N, bias=bias)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        found: Tensor = self.head(self.table(tokens))
        return found


@pytest.mark.parametrize("grid", GRIDS)
def test_a_table_gives_the_rows_that_its_integers_stand_for(grid: IntegerGrid) -> None:
    W = rows(grid)
    table = WholeTable.from_rounded(W)
    tokens = torch.tensor([[3, 0, 19], [3, 3, 7]])
    assert torch.equal(table(tokens), W.weight[tokens])
    assert torch.equal(table.weight, W.weight)
    assert torch.equal(table.matrix, W.weight.T)
    left, right = table.two_factors()
    assert torch.equal(left @ right, table.matrix)
    assert table.shape == (M, N)
    assert table.nbytes(M, N, M, dtype=torch.float16, grid=grid) == sum(
        (part.half() if part.is_floating_point() else part).nbytes for part in table.state_dict().values()
    )
    dense = table.to_dense()
    assert type(dense) is nn.Embedding
    assert torch.equal(dense(tokens), table(tokens))


def test_its_description_makes_it_again() -> None:
    table = WholeTable.from_rounded(rows(GRIDS[1]))
    table.adopt_(ScaledEmbedding(N, M, padding_idx=2, times=Times(3.3, rounded=True)))
    spec = table.spec()
    assert WholeTable.is_spec(spec)
    again = WholeTable.from_spec(spec, N, M, bias=False)
    again.load_state_dict(table.state_dict())
    tokens = torch.tensor([0, 5])
    assert torch.equal(again(tokens), table(tokens))
    assert again.spec() == spec
    for wrong in ({"times": 2.0}, {"times": {"value": "2", "rounded": False}}, {"padding": -1}, {"bag": "sum"}):
        assert not WholeTable.is_spec({**spec, **wrong})
    with pytest.raises(ValueError, match="must be its smaller side, got 3"):
        WholeTable.from_spec({**spec, "rank": 3}, N, M, bias=False)


class Twice(nn.Embedding):
    """Looks up rows and does more with them than multiply by a number."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_tables_multiply_by_is_tried_out(device: str) -> None:
    with torch.device(device):
        gemma = Gemma3TextScaledWordEmbedding(N, M, 0, embed_scale=M**0.5 + 0.3)
        bart = BartScaledWordEmbedding(N, M, 0, embed_scale=M**0.5 + 0.3)
        plain, twice = nn.Embedding(N, M), Twice(N, M)
        bounded = nn.Embedding(N, M, max_norm=1.0)
    found = times_of(gemma)
    assert found is not None
    assert found.rounded
    assert found.value == M**0.5 + 0.3 or device == "meta"  # where its number is not in memory
    assert times_of(gemma.to(torch.bfloat16)) == found
    assert times_of(bart) == Times(M**0.5 + 0.3, rounded=False)
    assert times_of(plain) == Times()
    assert times_of(twice) is times_of(bounded) is times_of(nn.Linear(M, N)) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [Gemma3TextScaledWordEmbedding, BartScaledWordEmbedding])
def test_scaled_rows_are_those_of_the_model(kind: Any, dtype: torch.dtype) -> None:
    dense = kind(N, M, 0, embed_scale=M**0.5 + 0.3)
    table = WholeTable.from_rounded(rows(GRIDS[0]))
    table.adopt_(dense)
    dense.weight.data = table.weight.clone()
    dense, table, tokens = dense.to(dtype), table.to(dtype), torch.arange(N)
    dense.weight.data = table.weight.clone()
    assert torch.equal(table(tokens), dense(tokens))
    assert torch.equal(table.to_dense()(tokens), dense(tokens))
    assert WholeTable.replaces(dense)
    assert not EmbeddingFactors.replaces(dense)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("head_first", [True, False])
def test_a_tied_head_reads_the_integers_of_the_table(grid: IntegerGrid, bias: bool, head_first: bool) -> None:
    model = Tied(bias=bias, head_first=head_first)
    assert tied_to(model, "table") == ["head"]
    W = rows(grid)
    table = WholeTable.from_rounded(W)
    table.adopt_(model.table)
    expected = copy.deepcopy(model)
    expected.table.weight.data.copy_(W.weight)
    swap_(model, {"table": table})
    assert isinstance(model.head, WholeLinear)
    head: Any = model.head
    for key in ("integers", "scale", "zeros"):
        assert getattr(head.W, key) is getattr(table.W, key)
    tokens = torch.tensor([[3, 0, 19]])
    assert torch.allclose(model(tokens), expected(tokens), rtol=1e-5, atol=1e-5)
    unique = {id(part): part for part in model.parameters()}
    assert len(unique) == len(W.state_dict()) + bias
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert half.head.W.scale is half.table.W.scale
    assert half(tokens).dtype == torch.bfloat16


def test_a_transposed_weight_is_not_read() -> None:
    with pytest.raises(ValueError, match="a Conv1D cannot read what the layout 'table' stores"):
        reading(WholeTable.from_rounded(rows(GRIDS[0])), Conv1D(N, M))
