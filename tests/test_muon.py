"""Muon: matrices and kernels by orthogonal steps, as torch's own has them, the rest as AdamW."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from vlae import muon
from vlae.muon import Muon, orthogonal, slow_bfloat16


def named(parameters: list[nn.Parameter]) -> list[tuple[str, nn.Parameter]]:
    return [(f"layer.{k}", p) for k, p in enumerate(parameters)]


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (7, 7), (1, 4)])
def test_steps_are_nearly_orthogonal(shape: tuple[int, int], slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muon, "slow_bfloat16", lambda device: slow)  # both, whichever this processor would take
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape, dtype=torch.float64)
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    found = u.mT @ orthogonal(matrices) @ v.mT  # the singular values, in the basis of those of the matrix
    values = found.diagonal(dim1=1, dim2=2)
    assert found.dtype == torch.float64
    assert values.min() > 0.6
    assert values.max() < 1.3
    assert (found - torch.diag_embed(values)).abs().max() < (1e-5 if slow else 0.05)
    assert orthogonal(torch.zeros(1, *shape)).abs().max() == 0


def test_units_that_learn_nothing_more_leave_no_denormal_numbers() -> None:
    """Their momentum falls by a twentieth a step, through numbers that some processors multiply 100 times slower."""
    x = torch.randn(1, 12, 20)
    x[:, 3:9] *= torch.logspace(-11, -43, 6)[:, None]
    found = orthogonal(x)
    assert not found[:, 3:9].any()
    alive = [0, 1, 2, 9, 10, 11]
    torch.testing.assert_close(found[:, alive], orthogonal(x[:, alive]), rtol=0, atol=0.02)  # bfloat16
    assert (found[:, alive].abs() > torch.finfo(torch.float32).tiny).all()


def test_bfloat16_is_for_processors_that_have_it() -> None:
    """As the system lists what the processor has: torch takes it on others, too, slowly."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().split() if cpuinfo.exists() else []
    if torch.backends.cpu.get_cpu_capability().startswith("AVX") and flags:
        assert slow_bfloat16(torch.device("cpu")) == ("avx512_bf16" not in flags)
    assert not slow_bfloat16(torch.device("cuda"))


def test_matrices_move_as_by_torch() -> None:
    """Two alike, whose steps are taken together, and one by itself."""
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)) for shape in [(6, 20), (6, 20), (20, 6)]]
    theirs = copy.deepcopy(ours)
    mine = Muon(named(ours), lr=0.01, weight_decay=0.1)
    other = torch.optim.Muon(theirs, lr=0.01, weight_decay=0.1, adjust_lr_fn="original")
    for _ in range(4):
        before = [p.detach().clone() for p in ours]
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        mine.step()
        other.step()
        for p, q, start in zip(ours, theirs, before, strict=True):
            assert (p - q).norm() < 0.1 * (p - start).norm()  # bfloat16, and what four steps add
            assert p.grad is None


def test_kernels_are_matrices_in_any_memory_format() -> None:
    torch.manual_seed(0)
    kernel = nn.Parameter(torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last))
    matrix = nn.Parameter(kernel.detach().reshape(4, 27).clone())
    both = Muon(named([kernel]), lr=0.01, weight_decay=0.0), Muon(named([matrix]), lr=0.01, weight_decay=0.0)
    for _ in range(3):
        matrix.grad = torch.randn(4, 27)
        kernel.grad = matrix.grad.view(4, 3, 3, 3).to(memory_format=torch.channels_last)
        for one in both:
            one.step()
    assert torch.equal(kernel.flatten(1), matrix)


def test_the_rest_goes_by_adamw() -> None:
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(5, 5)), nn.Parameter(torch.randn(()))]
    theirs = [nn.Parameter(ours[k].detach().clone()) for k in (0, 2)]
    head = nn.Parameter(torch.randn(4, 5))
    ours.append(head)
    theirs.append(nn.Parameter(head.detach().clone()))
    mine = Muon([*named(ours[:3]), ("decoder.head.weight", head)], lr=0.01, weight_decay=0.1)
    other = torch.optim.AdamW(theirs, lr=0.002, weight_decay=0.1)

    def loss(parameters: list[nn.Parameter]) -> torch.Tensor:
        return sum((p.square().sum() for p in parameters), torch.zeros(()))

    def closure() -> torch.Tensor:
        mine.zero_grad()
        value = loss(ours)
        value.backward()
        return value

    for _ in range(4):
        before = loss(ours).item()
        assert mine.step(closure).item() == before
        other.zero_grad()
        loss(theirs).backward()
        other.step()
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[2], theirs[1])
    assert torch.equal(head, theirs[2])


def test_goes_on_from_its_state() -> None:
    torch.manual_seed(0)
    one = [nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(3))]
    gradients = [[torch.randn_like(p) for p in one] for _ in range(4)]
    first = Muon(named(one), lr=0.01, weight_decay=0.0)
    for k, gradient in enumerate(gradients):
        if k == 2:
            two = copy.deepcopy(one)
            second = Muon(named(two), lr=0.01, weight_decay=0.0)
            second.load_state_dict(copy.deepcopy(first.state_dict()))
        for p, g in zip(one, gradient, strict=True):
            p.grad = g.clone()
        first.step()
    for gradient in gradients[2:]:
        for p, g in zip(two, gradient, strict=True):
            p.grad = g.clone()
        second.step()
    assert all(map(torch.equal, one, two))
