"""A batch's arrays on their way to the device."""

import pytest
import torch

from innerloop.learning.devices import moved

VALUES = [torch.arange(12).reshape(3, 4), torch.rand(5, 2), torch.empty(0, 3), torch.tensor([True, False])]


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("device", [torch.device("cpu"), None])
def test_on_the_cpu_nothing_is_copied(values: torch.Tensor, device: torch.device | None) -> None:
    assert moved(values, device) is values


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("values", VALUES)
def test_on_a_gpu_the_values_are_the_same_also_when_their_memory_is_used_again(values: torch.Tensor) -> None:
    """The source may change as soon as the call is back: the copy goes from pinned memory of its own."""
    expected, source = values.clone(), values.clone()
    found = moved(source, torch.device("cuda:0"))
    source.zero_()
    assert found.device.type == "cuda"
    assert torch.equal(found.cpu(), expected)
