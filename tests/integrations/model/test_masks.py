from __future__ import annotations

import pytest
import torch
from torch import nn

from cur.integrations.model.masks import by_token, token_rows

BATCH, LENGTH, WIDTH, STREAMS = 3, 5, 7, 4
PLAIN = torch.randn(BATCH, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0))
STREAMED = torch.randn(BATCH, LENGTH, STREAMS, WIDTH, generator=torch.Generator().manual_seed(1))

STATES = [
    (PLAIN, PLAIN),
    (PLAIN.transpose(0, 1), PLAIN),
    (PLAIN.reshape(BATCH * LENGTH, WIDTH), PLAIN),
    (STREAMED, STREAMED.flatten(2)),
    (STREAMED.movedim(2, 0), STREAMED.flatten(2)),
]


@pytest.mark.parametrize(("state", "wanted"), STATES)
def test_a_hidden_state_has_a_vector_for_each_token(state: torch.Tensor, wanted: torch.Tensor) -> None:
    assert torch.equal(by_token(state, [(BATCH, LENGTH)]), wanted)
    assert torch.equal(by_token(state, [(9, 11), (BATCH, LENGTH)]), wanted)


def test_places_of_an_image_are_its_tokens() -> None:
    image = torch.randn(BATCH, LENGTH, LENGTH, WIDTH, generator=torch.Generator().manual_seed(2))
    wanted = image.flatten(1, 2)
    block = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH))
    assert torch.equal(by_token(image, [], block), wanted)
    assert torch.equal(by_token(image.movedim(-1, 1), [], block), wanted)
    square = torch.randn(BATCH, WIDTH, WIDTH, WIDTH, generator=torch.Generator().manual_seed(3))
    convolutions = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3), nn.BatchNorm2d(WIDTH))
    assert torch.equal(by_token(square, [], block), square.flatten(1, 2))
    assert torch.equal(by_token(square, [], convolutions), square.flatten(2).mT)


def test_a_hidden_state_without_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"of shape \(4, 7\), which has not one vector for each token"):
        by_token(torch.zeros(4, 7), [(BATCH, LENGTH)])


@pytest.mark.parametrize("state", [state for state, _ in STATES])
def test_padding_is_left_out_wherever_the_tokens_are(state: torch.Tensor) -> None:
    mask = torch.arange(LENGTH)[None] < torch.tensor([2, 5, 3])[:, None]
    found = token_rows(state, mask, "x")
    kept = (STREAMED if state.ndim == 4 else PLAIN)[mask].reshape(-1, WIDTH)
    assert torch.equal(found.sort(0).values, kept.sort(0).values)
