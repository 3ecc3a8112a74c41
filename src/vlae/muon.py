"""Muon: matrices move by orthogonal matrices, all else by AdamW."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

MOMENTUM = 0.95
ADAMW = 0.2  # of the learning rate: its steps are of each number, not of a matrix
NEWTON_SCHULZ = 3.4445, -4.7750, 2.0315


def slow_bfloat16(device: torch.device) -> bool:
    """Whether it is a processor without AVX512's bfloat16 or SVE: torch is several times faster in float32 there."""
    if device.type != "cpu":
        return False
    kernels = torch.backends.cpu.get_cpu_capability()
    if kernels.startswith("AVX512"):
        return not torch.cpu.get_capabilities().get("avx512_bf16", False)
    return not kernels.startswith("SVE")


def orthogonal(matrices: Float[Tensor, "N m n"]) -> Float[Tensor, "N m n"]:
    """About U V^T of each U S V^T: singular values near 1, by five Newton-Schulz steps (Jordan et al.).

    They are in bfloat16, or in float32 on a processor where that is faster.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[1] > matrices.shape[2]
    dtype = torch.float32 if slow_bfloat16(matrices.device) else torch.bfloat16
    x = (matrices.mT if tall else matrices).to(dtype, memory_format=torch.contiguous_format)
    # what stays below 1e-6 after five steps counts as 0: some processors multiply denormal numbers many times slower
    x = F.hardshrink(x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7), 1e-9)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices)


class Muon(torch.optim.AdamW):
    """Steps along the orthogonal matrix nearest to the momentum (Jordan et al. 2024): all directions of a layer learn
    alike fast. A kernel is the matrix [out, all else] and a matrix [m, n] moves by lr sqrt(max(1, m / n)).

    A masked matrix moves where it is masked too, in vain. What is no matrix, and layers named `head`, go by AdamW, at a
    fifth of `lr`. torch's own is for matrices alone. A step uses the gradients of its matrices up: they are None
    afterwards.
    """

    def __init__(self, named: Iterable[tuple[str, Tensor]], lr: float, weight_decay: float):
        parts: dict[bool, list[Tensor]] = {True: [], False: []}
        for name, p in named:
            parts[p.ndim > 1 and "head" not in name.split(".")].append(p)
        rates = {True: lr, False: ADAMW * lr}
        groups = [{"params": parts[each], "orthogonal": each, "lr": rates[each]} for each in parts]
        super().__init__(groups, weight_decay=weight_decay)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in (group for group in self.param_groups if group["orthogonal"]):
            alike: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    alike[len(p), p[0].numel()].append((p, p.grad))
            for (m, n), pairs in alike.items():  # at once: a GPU would wait for one after the other
                moves = []
                for p, gradient in pairs:
                    state = self.state[p]
                    if not state:
                        state["momentum"] = torch.zeros_like(p)
                        state["step"] = torch.zeros(())  # AdamW wants one when it loads
                    state["momentum"].lerp_(gradient, 1 - MOMENTUM)
                    moves.append(gradient.lerp(state["momentum"], MOMENTUM).flatten(1))
                    p.grad = None
                for (p, _), move in zip(pairs, orthogonal(torch.stack(moves)), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.sub_(move.view(p.shape), alpha=group["lr"] * max(1, m / n) ** 0.5)
        super().step()
        return loss
