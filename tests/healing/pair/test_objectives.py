from __future__ import annotations

import pytest
import torch

from cur.healing.pair.objectives import output_losses, relative_distance, token_weights


def test_massive_channels_do_not_rule() -> None:
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(2, 50, 16, generator=generator)
    wrong = 0.5 * torch.randn(2, 50, 16, generator=generator)
    plain = relative_distance(g + wrong, g, token_weights(g, None))
    scale = torch.ones(16)
    scale[3] = 1e4  # a channel as real models have them
    massive = relative_distance((g + wrong) * scale, g * scale, torch.ones(2, 50))
    assert massive == pytest.approx(float(plain), rel=0.05)
    assert relative_distance(torch.zeros_like(g), g, torch.ones(2, 50)) == pytest.approx(1.0)
    assert relative_distance(g, g, torch.ones(2, 50)) == 0


def test_massive_tokens_do_not_rule() -> None:
    g = torch.randn(1, 50, 16, generator=torch.Generator().manual_seed(0))
    g[0, 0] *= 1e3
    mask = torch.ones(1, 50, dtype=torch.bool)
    mask[0, -1] = False
    weights = token_weights(g, mask)
    assert weights[0, -1] == 0
    assert weights[0, 0] < 1e-3
    assert (weights[0, 1:-1] == 1).all()


def test_a_channel_that_is_zero_in_the_teacher() -> None:
    g = torch.randn(1, 20, 4, generator=torch.Generator().manual_seed(0))
    g[..., 2] = 0
    assert torch.isfinite(relative_distance(torch.ones_like(g), g, torch.ones(1, 20)))
    assert relative_distance(torch.zeros(1, 3, 2), torch.zeros(1, 3, 2), torch.ones(1, 3)) == 0


@pytest.mark.parametrize(("kl", "next_token", "temperature"), [(1, 0, 1), (0, 1, 1), (0.7, 0.3, 1), (1, 0.5, 2.5)])
def test_losses_and_gradients_are_those_of_autograd(
    kl: float, next_token: float, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cur.healing.pair.objectives._CHUNK", 5 * 11)  # several chunks
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(11, 6, generator=generator)
    h = torch.randn(17, 6, generator=generator).requires_grad_(True)
    g = torch.randn(17, 6, generator=generator)
    labels = torch.randint(11, (17,), generator=generator)
    labels[3] = -100

    def logits(x: torch.Tensor) -> torch.Tensor:
        return x @ head.T

    total, parts = output_losses(
        h, g, labels, logits=(logits, logits), kl=kl, next_token=next_token, temperature=temperature
    )
    (found,) = torch.autograd.grad(2 * total, h)
    kept = labels != -100
    ce = torch.nn.functional.cross_entropy(logits(h), labels, ignore_index=-100)
    ours, theirs = (logits(x)[kept].div(temperature).log_softmax(-1) for x in (h, g))
    divergence = torch.nn.functional.kl_div(ours, theirs, log_target=True, reduction="batchmean") * temperature**2
    expected = kl * divergence + next_token * ce
    (gradient,) = torch.autograd.grad(2 * expected, h)
    assert float(total.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert torch.allclose(found, gradient, rtol=1e-4, atol=1e-6)
    assert parts["next_token"] == pytest.approx(float(ce.detach()), rel=1e-5)
    assert ("kl" in parts) == bool(kl)
    same, _ = output_losses(g, g, labels, logits=(logits, logits), kl=1, next_token=0, temperature=1, learning=False)
    assert abs(float(same)) <= 1e-6
