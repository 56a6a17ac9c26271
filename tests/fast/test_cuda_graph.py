import pytest
import torch

from lace_lora.fast.cuda_graph import CaptureError, CudaGraphs

pytestmark = pytest.mark.gpu


def test_each_signature_has_a_graph_of_its_own() -> None:
    gpu = torch.device("cuda")
    graphs = CudaGraphs(lambda one, other: one.sum() - other.sum(), gpu)
    for count in (2, 3, 2, 3, 2, 3):
        one, other = torch.randn(count), torch.randn(2 * count)
        torch.testing.assert_close(graphs(one.pin_memory(), other.to(gpu)).cpu(), one.sum() - other.sum())
    assert len(graphs.graphs) == 2


def test_a_function_that_waits_for_the_gpu_cannot_be_captured() -> None:
    gpu = torch.device("cuda")
    stream = torch.cuda.current_stream()
    graphs = CudaGraphs(lambda values: values.sum() * values.sum().item(), gpu)
    graphs(torch.ones(2, device=gpu))
    with pytest.raises(CaptureError, match="captur"):
        graphs(torch.ones(2, device=gpu))
    assert torch.rand(2, device=gpu).min() > 0  # nothing of the failed capture is left behind
    assert torch.cuda.current_stream() == stream
