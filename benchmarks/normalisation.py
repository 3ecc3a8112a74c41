"""Which normalisation trains the binary model best at equal images seen? The answer is what `vlae.layers` holds.

none    residual branches and the head start at zero, nothing is normalised
weight  weight normalisation of every linear and convolution layer outside the prior, gains and biases set from the
        first batch (Salimans and Kingma 2016, sections 2 and 3), as in the VLAE paper
layer   layer normalisation without parameters before every residual branch (Ba et al. 2016): the blocks as they are

One JSON line a variant: NELBO in nats (bound) on 2,000 validation images of static MNIST after each fifth of the steps.
"""

import argparse
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from vlae.data import Images
from vlae.datasets import mnist_static
from vlae.layers import ConvBlock, MaskedLinear, PixelBlock
from vlae.model import VLAE, build
from vlae.noise import generator
from vlae.records import commit, emit, hardware

MODEL = yaml.safe_load((Path(__file__).parents[1] / "conf" / "model" / "binary.yaml").read_text())


def weight_normalise(model: VLAE, x: torch.Tensor, eps: torch.Tensor) -> None:
    """Outputs of a layer start with mean 0 and deviation 1 on the first batch, 0.1 where a branch or the head ends."""
    ends = {block.out for block in model.modules() if isinstance(block, ConvBlock | PixelBlock)} | {model.decoder.head}
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d) and not isinstance(m, MaskedLinear)]
    for layer in layers:
        if not layer.weight.any():
            nn.init.normal_(layer.weight, std=0.05)
        weight_norm(layer)

    def set_gain(layer: nn.Module, _: tuple[torch.Tensor], out: torch.Tensor) -> torch.Tensor:
        axis = (1 if isinstance(layer, nn.Conv2d) else -1) % out.ndim
        others = [d for d in range(out.ndim) if d != axis]
        gain = (0.1 if layer in ends else 1.0) / (out.std(others) + 1e-3)
        shift = -out.mean(others) * gain
        layer.parametrizations.weight.original0.mul_(gain.view(-1, *[1] * (layer.weight.ndim - 1)))
        shape = [-1 if d == axis else 1 for d in range(out.ndim)]
        if layer.bias is None:
            return out * gain.view(shape)
        layer.bias.mul_(gain).add_(shift)
        return out * gain.view(shape) + shift.view(shape)

    hooks = [layer.register_forward_hook(set_gain) for layer in layers]
    with torch.no_grad():
        model(x, eps)
    for hook in hooks:
        hook.remove()


def pixel_block(block: PixelBlock, x: torch.Tensor) -> torch.Tensor:
    a, b = block.gate(x).chunk(2, -1)
    return x + block.out(a * F.relu(b))


def conv_block(block: ConvBlock, x: torch.Tensor) -> torch.Tensor:
    return x + block.out(F.elu(block.conv(F.elu(x))))


def measure(variant: str, images: Images, steps: int, lr: float) -> dict[str, object]:
    torch.manual_seed(0)
    model = build(MODEL, images.shape, images.levels)
    for block in model.modules() if variant != "layer" else ():
        if isinstance(block, PixelBlock | ConvBlock):
            block.forward = partial(pixel_block if isinstance(block, PixelBlock) else conv_block, block)  # type: ignore
    if variant == "weight":
        first = images.train_dataloader()[0].x
        weight_normalise(model, first, torch.randn(len(first), 64))
    optimizer = torch.optim.Adamax(model.parameters(), lr=lr)
    average = torch.optim.swa_utils.AveragedModel(
        model, avg_fn=lambda a, p, n: a.lerp(p, 1 - min(0.998, (1 + n) / (10 + n)))
    )
    part = images.part("validation")
    index = torch.randperm(len(part.images), generator=generator("part"))[:2000]
    begun, curve = time.time(), []
    for step in range(steps):
        x = images.train_dataloader()[step].x
        with torch.autocast("cpu", torch.bfloat16):
            terms = model(x, torch.randn(len(x), 64, generator=generator("eps", step)))
        loss = terms.distortion.mean() + terms.rate.mean().clamp(min=7.84)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        average.update_parameters(model)
        if (step + 1) % (steps // 5) == 0:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                eps = torch.randn(len(index), 64, generator=generator("validation"))
                nelbo = [
                    -average.module(part.images[i], e).elbo
                    for i, e in zip(index.split(500), eps.split(500), strict=True)
                ]
            curve.append(round(torch.cat(nelbo).mean().item(), 2))
    return {
        "bench": "normalisation",
        "variant": variant,
        "lr": lr,
        "batch": images.batch_size,
        "steps": steps,
        "data": "mnist_static",
        "split": "validation",
        "images": len(index),
        "commit": commit(),
        "hardware": hardware(torch.device("cpu")),
        "val/nelbo": curve,
        "train_s": round(time.time() - begun, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, nargs="+", default=[0.002])
    parser.add_argument("--variants", nargs="+", default=["none", "weight", "layer"])
    parser.add_argument("--out", type=Path, help="a file to append the lines to")
    arguments = parser.parse_args()
    images = Images(mnist_static, root=None, batch_size=64, eval_batch_size=500, seed=0)
    images.setup()
    for variant in arguments.variants:
        for lr in arguments.lr:
            emit(measure(variant, images, arguments.steps, lr), arguments.out)


if __name__ == "__main__":
    main()
