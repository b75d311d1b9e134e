"""Muon against torch's own, matrix by matrix."""

import pytest
import torch

from mhesa.training.muon import Muon, orthogonalise

SHAPES = [(6, 4), (4, 6), (6, 4), (5, 5), (4, 6)]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_equals_torch_muon(weight_decay):
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    theirs = [torch.nn.Parameter(parameter.detach().clone()) for parameter in ours]
    optimizers = [
        Muon(ours, lr=0.02, weight_decay=weight_decay),
        torch.optim.Muon(theirs, lr=0.02, weight_decay=weight_decay),
    ]
    for _ in range(5):
        for own, other in zip(ours, theirs, strict=True):
            own.grad = torch.randn_like(own)
            other.grad = own.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, atol=2e-3, rtol=2e-2)
    assert optimizers[0].state_dict().keys() == optimizers[1].state_dict().keys()


def test_singular_values_come_near_one():
    matrices = torch.randn(3, 16, 40, dtype=torch.float64)
    done = orthogonalise(matrices, (3.4445, -4.775, 2.0315), 5, 1e-7)
    values = torch.linalg.svdvals(done)
    assert 0.5 < values.min() <= values.max() < 1.3
    torch.testing.assert_close(orthogonalise(matrices.mT, (3.4445, -4.775, 2.0315), 5, 1e-7), done.mT)


def test_a_matrix_without_gradient_stays():
    still, moved = torch.nn.Parameter(torch.eye(3)), torch.nn.Parameter(torch.eye(3))
    moved.grad = torch.randn(3, 3)
    Muon([still, moved], lr=0.1, weight_decay=0.1).step()
    assert torch.equal(still, torch.eye(3))
    assert not torch.equal(moved, torch.eye(3))
