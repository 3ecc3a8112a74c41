"""How near training comes to what the machine can do, and which part of the model the time goes to.

Measured, in bfloat16 autocast, all taking turns, each figure the median over the turns: whole training steps on a batch
that is on the device already; forward and backward of each part of the model by itself; the product of two large
square matrices, in bfloat16 and in float32 (in which the prior works); the copy of a large tensor. Compiling and the
first calls are outside.

Counted: FLOPs of matrix products and convolutions (`FlopCounterMode`), and the least bytes moved. For those a part's
forward and backward graphs, as `torch.compile` cuts them, are read as matrix products, convolutions and fused kernels
of all that lies between two of them: each reads what it is given once and writes what others need once.

The roofline gives each part the larger of FLOPs / measured rate and bytes / measured bandwidth, and `update` (clipping,
optimiser, average of the weights) its bytes; the sum is the least time of a step. The measured time of `update` is what
a step takes beyond the parts. One JSON line a model; OMP_NUM_THREADS sets the threads of a processor.
"""

import argparse
import operator
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from training import DATA, Loop, data_for, images_for, settings

from vlae.layers import normal_log_prob
from vlae.model import VLAE
from vlae.records import commit, emit, hardware

Part = tuple[Callable[..., Any], list[Tensor], list[nn.Module]]  # what it computes, of what, with whose weights


def parts_of(model: VLAE, x: Tensor, eps: Tensor) -> dict[str, Part]:
    """The parts of `model(x, eps)`."""
    encoder, prior, decoder, likelihood = model.encoder, model.prior, model.decoder, model.likelihood

    def window(u: Tensor) -> Tensor:
        with torch.autocast(u.device.type, enabled=False):
            return decoder.look(decoder.shown(u, decoder.neighbours))

    def pixelwise(h: Tensor, local: Tensor) -> Tensor:
        return decoder.head(decoder.blocks((h.flatten(2).mT + local).to(h.dtype))).mT.unflatten(2, h.shape[2:])

    with torch.no_grad():
        u = model.unit(x)
        z = model.encode(x).rsample_with_log_prob(eps)[0]
        h = decoder.features(z)
        local, params = window(u), decoder(u, h)
    for tensor in (z, h, local, params):
        tensor.requires_grad_()
    return {
        "encoder": (lambda u: tuple(encoder(u)), [u], [encoder]),
        "prior": (lambda z: normal_log_prob(prior(z)[0]), [z], [prior]),
        "trunk": (decoder.features, [z], [decoder.trunk, decoder.mix]),
        "window": (window, [u], [decoder.look]),
        "pixelwise": (pixelwise, [h, local], [decoder.blocks, decoder.head]),
        "likelihood": (lambda params: likelihood.log_prob(params, x), [params], []),
    }


def there_and_back(part: Part, autocast: torch.autocast) -> Callable[[], object]:
    """Forward and backward of a part, for one drawn gradient of what it computes."""
    compute, inputs, modules = part
    leaves = [t for t in inputs if t.requires_grad] + [p for module in modules for p in module.parameters()]
    gradients: list[Tensor] = []

    def run() -> None:
        for leaf in leaves:
            leaf.grad = None
        with autocast:
            result = compute(*inputs)
        outputs = [result] if isinstance(result, Tensor) else list(result)
        if not gradients:
            gradients.extend(torch.randn_like(output) for output in outputs)
        torch.autograd.backward(outputs, gradients)

    return run


def moved(graph: fx.Graph) -> int:
    """Least bytes that a graph moves, in fused kernels between matrix products and convolutions."""

    def is_view(node: fx.Node) -> bool:
        return getattr(node.target, "is_view", False) or node.target is torch.ops.aten._unsafe_view.default

    def tensor(node: fx.Node) -> fx.Node:
        """What a view shows."""
        inner: Any = node.args[0] if node.args else None
        if is_view(node) or (node.target is operator.getitem and is_view(inner)):
            return tensor(inner)
        return node

    def kernel(node: fx.Node) -> fx.Node | str:
        if node.target is operator.getitem:
            return kernel(node.args[0])  # type: ignore[arg-type]
        alone = getattr(node.target, "overloadpacket", None) in flop_registry
        return node if alone else "fused" if node.op == "call_function" else "outside"

    accesses: set[tuple[fx.Node, fx.Node | str]] = set()
    for node in graph.nodes:
        for source in map(tensor, () if tensor(node) is not node else node.all_input_nodes):
            maker, user = kernel(source), kernel(node)
            if maker != user:
                accesses |= {(source, maker), (source, user)}
    values = [source.meta["val"] for source, by in accesses if by != "outside"]
    return sum(value.numel() * value.itemsize for value in values if isinstance(value, Tensor))


def counted(part: Part, autocast: torch.autocast) -> tuple[int, int]:
    """FLOPs and least bytes of a part's forward and backward."""
    with FlopCounterMode(display=False) as flops:
        there_and_back(part, autocast)()
    traffic: list[int] = []

    def count(graph: fx.GraphModule, _: object) -> Any:
        traffic.append(moved(graph.graph))
        return make_boxed_func(graph.forward)

    cut = {"partition_fn": min_cut_rematerialization_partition, "decompositions": select_decomp_table()}
    backend = aot_autograd(fw_compiler=count, bw_compiler=count, **cut)
    compute = torch.compile(part[0], backend=backend, dynamic=False, fullgraph=True)
    there_and_back((compute, *part[1:]), autocast)()
    return flops.get_total_flops(), sum(traffic)


def seconds(work: dict[str, Callable[[], object]], device: torch.device, length: float, turns: int) -> dict[str, float]:
    """Of one call of each: medians over turns of at least `length` seconds."""

    def timed(call: Callable[[], object], calls: int) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        begun = time.perf_counter()
        for _ in range(calls):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - begun) / calls

    calls = {}
    for name, call in work.items():
        timed(call, 3)  # compiles, chooses algorithms, fills the caches of memory
        calls[name] = int(length / timed(call, 3)) + 1
    rows = [{name: timed(call, calls[name]) for name, call in work.items()} for _ in range(turns)]
    return {name: median(row[name] for row in rows) for name in work}


def measure(name: str, arguments: argparse.Namespace) -> dict[str, object]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = arguments.batch or (1024 if device.type == "cuda" else 32)
    config = settings(name, ["trainer.precision=bf16-mixed", f"compile={arguments.compile}"])
    torch.manual_seed(config["seed"])
    loop = Loop(config, images_for(data_for(name), batch, config["seed"]), device)
    autocast = torch.autocast(device.type, torch.bfloat16)
    x = loop.batches[0].x.to(device)
    with autocast:
        parts = parts_of(loop.model, x, torch.randn(batch, loop.code, device=device))
    counts = {part: counted(content, autocast) for part, content in parts.items()}
    numbers = sum(p.numel() for p in loop.parameters)
    # float32: norm of the gradient; gradient, weight, two moments and average read, all but the gradient written
    counts["update"] = (0, 4 * numbers * (1 + 5 + 4))

    if arguments.compile:
        torch.compiler.reset()
        parts = {part: (torch.compile(f, dynamic=False), u, weights) for part, (f, u, weights) in parts.items()}
    side, size = (8192, 2**30) if device.type == "cuda" else (2048, 2**28)
    matrix = torch.randn(side, side, device=device)
    half, source = matrix.bfloat16(), torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    work: dict[str, Callable[[], object]] = {part: there_and_back(parts[part], autocast) for part in parts}
    work |= {"step": lambda: loop.learn(x), "bfloat16": lambda: half @ half, "float32": lambda: matrix @ matrix}
    took = seconds(work | {"copy": lambda: target.copy_(source)}, device, arguments.seconds, arguments.turns)

    took["update"] = took["step"] - sum(took[part] for part in parts)
    rates = {precision: 2 * side**3 / took[precision] for precision in ("bfloat16", "float32")}
    bandwidth = 2 * size / took["copy"]
    least = {
        part: max(flops / rates["float32" if part in ("prior", "window") else "bfloat16"], moved / bandwidth)
        for part, (flops, moved) in counts.items()
    }
    flops = sum(count[0] for count in counts.values())
    return {
        "bench": "roofline",
        "model": name,
        "device": hardware(device),
        "precision": "bf16-mixed",
        "compile": arguments.compile,
        "batch": batch,
        "parameters": numbers,
        "images_per_s": round(batch / took["step"], 2),
        "roofline_images_per_s": round(batch / sum(least.values()), 2),
        "roofline_share": round(sum(least.values()) / took["step"], 4),
        "gflop_per_image": round(flops / batch / 1e9, 4),
        "tflop_per_s": round(flops / took["step"] / 1e12, 4),
        "matmul_tflop_per_s": {precision: round(rate / 1e12, 4) for precision, rate in rates.items()},
        "matmul_share": round(flops / took["step"] / rates["bfloat16"], 4),
        "copy_gb_per_s": round(bandwidth / 1e9, 2),
        "parts": {
            part: {
                "mflop_per_image": round(counts[part][0] / batch / 1e6, 2),
                "mb_per_image": round(counts[part][1] / batch / 1e6, 3),
                "roofline_us_per_image": round(1e6 * least[part] / batch, 3),
                "us_per_image": round(1e6 * took[part] / batch, 3),
                "step_share": round(took[part] / took["step"], 4),
            }
            for part in counts
        },
        "commit": commit(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["colour", "colour_small"], choices=DATA)
    parser.add_argument("--batch", type=int, help="default: 32; on a GPU 1,024")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--seconds", type=float, default=0.5, help="least length of a turn")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--out", type=Path, help="a file to append the lines to")
    arguments = parser.parse_args()
    for model in arguments.models:
        emit(measure(model, arguments), arguments.out)


if __name__ == "__main__":
    main()
