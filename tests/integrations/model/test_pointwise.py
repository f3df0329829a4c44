"""Convolutions of one point are linear layers over channels, from the targets to the checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import nn
from torch.nn.utils import parametrizations

from cur.integrations import CompressConfig, compress, dense_export, linear_modules, save
from cur.integrations.model.pointwise import LinearConvolution, is_pointwise
from cur.integrations.plan.plan import fingerprint

KINDS = {
    "image": (nn.Conv2d(5, 7, 1), (2, 5, 3, 4)),
    "image without bias": (nn.Conv2d(5, 7, 1, bias=False), (2, 5, 3, 4)),
    "one image": (nn.Conv2d(5, 7, 1), (5, 3, 4)),
    "sound": (nn.Conv1d(5, 7, 1), (2, 5, 9)),
    "one sound": (nn.Conv1d(5, 7, 1, dilation=2), (5, 9)),
}
OTHERS = [
    nn.Conv2d(4, 4, 3),
    nn.Conv2d(4, 4, 1, stride=2),
    nn.Conv2d(4, 4, 1, padding=1),
    nn.Conv1d(4, 4, 1, groups=2),
    nn.ConvTranspose2d(4, 4, 1),
    parametrizations.weight_norm(nn.Conv1d(4, 4, 1)),
    type("Standardized", (nn.Conv2d,), {})(4, 4, 1),
    nn.Linear(4, 4),
]


def mobile() -> hf.PreTrainedModel:
    """A network of convolutions alone, every other one of a single point, whose signals do not die out."""
    torch.manual_seed(0)
    config = hf.MobileNetV1Config(depth_multiplier=0.25, min_depth=8, image_size=64, tf_padding=True)
    model = hf.MobileNetV1ForImageClassification(config)
    norms = [part for part in model.modules() if isinstance(part, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    model.train()(torch.randn(8, 3, 64, 64))
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_the_layer_computes_what_the_convolution_does(kind: str) -> None:
    convolution, shape = KINDS[kind]
    assert is_pointwise(convolution)
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    linear = LinearConvolution(convolution)
    assert torch.allclose(linear(x), convolution(x), atol=1e-6)
    assert linear(x).is_contiguous()
    assert linear.linear.weight.data_ptr() == convolution.weight.data_ptr()
    assert (linear.stride, linear.kernel_size) == (convolution.stride, convolution.kernel_size)
    assert torch.equal(linear.weight, convolution.weight)
    back = linear.rolled()
    assert torch.equal(back(x), convolution(x))
    assert back.state_dict().keys() == convolution.state_dict().keys()


@pytest.mark.parametrize("other", OTHERS, ids=lambda other: f"{type(other).__name__}")
def test_others_stay_what_they_are(other: nn.Module) -> None:
    assert not is_pointwise(other)


def test_they_are_named_by_themselves_or_by_the_layer_in_them() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.narrow = nn.Conv2d(8, 4, 1)
            self.wide = nn.Conv2d(8, 4, 3)

    net = Net()
    for targets in ("all-linear", ("narrow",), ("narrow.linear",)):
        assert linear_modules(net, targets) == ["narrow.linear"]
    with pytest.raises(ValueError, match="none of them linear: they are Conv2d"):
        linear_modules(net, ("wide",))
    assert isinstance(net.narrow, nn.Conv2d)


def test_a_network_of_convolutions_is_compressed_saved_and_loaded(tmp_path: Path) -> None:
    model = mobile()
    batch = {"pixel_values": torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))}
    before = fingerprint(model)
    report = compress(model, [batch], CompressConfig(layers=3, targets="all-linear", rank=6), precision="float32")
    assert fingerprint(mobile()) == before == report.plan.fingerprint
    assert len(report.layers) == 3
    assert all(layer.name.endswith(".convolution.linear") for layer in report.layers)
    assert all(layer.output.worst <= 1.0 + 1e-6 for layer in report.layers if layer.output is not None)
    logits = model(**batch).logits
    assert not torch.allclose(logits, mobile()(**batch).logits, atol=1e-4)  # signals reach what was compressed
    save(model, None, tmp_path / "small")
    loaded = hf.AutoModelForImageClassification.from_pretrained(tmp_path / "small")
    assert torch.allclose(loaded(**batch).logits, logits, atol=1e-6)
    dense_export(loaded, None, tmp_path / "dense")
    dense = hf.AutoModelForImageClassification.from_pretrained(tmp_path / "dense")
    assert torch.allclose(dense(**batch).logits, logits, atol=1e-4)
    assert [type(part) for part in dense.modules()] == [type(part) for part in mobile().modules()]
