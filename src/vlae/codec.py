"""One batch of images onto a stack and back: codes on a grid, pixels in the waves of `scan`.

Codes and their noise are integers times a spacing, on a ring: z_i -> z_i - round(shift_i(z_<i)) is a bijection of it,
so nothing is lost and nothing outside a table. Floats agree in both directions because both compute them by the same
operations on tensors of the same shapes and strides.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, Int, Integer
from torch import Tensor, nn

from vlae.container import CodecError
from vlae.encoder import independent
from vlae.flow import Flow
from vlae.model import VLAE
from vlae.sampling import scan

REACH = 32  # the ring is [-32, 32), standard deviations of the noise
TAILS = 6  # standard deviations to either side at which codes are drawn


class Codec:
    """Pushes a model's codes and pixels onto constriction's ANS stacks, `spacing` between the values of a code.

    Raises:
        ValueError: for a prior with scales, as they make no bijection of a grid, or without constriction.
    """

    def __init__(self, model: VLAE, spacing: float):
        try:
            from constriction import stream
        except ImportError as error:
            raise ValueError("files need constriction; install it, or vlae with its extra `compress`") from error
        if not isinstance(model.prior, Flow) or (model.prior.scale and len(model.prior.steps)):
            raise ValueError("model.prior.scale=true: compression needs a model trained with model.prior.scale=false")
        weight = next(model.decoder.parameters())
        self.model, self.device, self.dtype = model, weight.device, weight.dtype
        self.spacing, self.reach = spacing, int(REACH / spacing)
        self.stack, self.gaussian = stream.stack.AnsCoder, stream.model.QuantizedGaussian
        self.standard = self.gaussian(-self.reach, self.reach - 1, 0.0, 1 / spacing)
        self.values = stream.model.Categorical(perfect=False)

    def wrap(self, k: Float64[Tensor, "B *D"]) -> Float64[Tensor, "B *D"]:
        return (k + self.reach).remainder(2 * self.reach) - self.reach

    def turned(self, step: nn.Module, k: Float64[Tensor, "B D"], sign: int) -> Float64[Tensor, "B D"]:
        """A step of the prior on the grid, code to noise (-1) or back (1): shifts in the order of `inverse`."""
        turned = torch.zeros_like(k)
        code = k if sign < 0 else turned
        z = self.z(code)
        for where, shift, _ in step.one_by_one(z):
            steps = (shift.double() / self.spacing).round()
            # a sum with large steps would not be exact
            turned[:, where] = self.wrap(k[:, where] + sign * self.wrap(steps))
            z[:, where] = self.z(code[:, where])
        return turned

    def noise(self, k: Float64[Tensor, "B D"]) -> Float64[Tensor, "B D"]:
        """`prior.forward` on the grid."""
        for n, step in enumerate(self.model.prior.steps):
            k = self.turned(step, k.flip(1) if n else k, -1)
        if not k.isfinite().all():
            raise FloatingPointError("the model's prior is not finite")
        return k

    def code(self, eps: Float64[Tensor, "B D"]) -> Float64[Tensor, "B D"]:
        """`prior.inverse` on the grid."""
        for n, step in reversed([*enumerate(self.model.prior.steps)]):
            eps = self.turned(step, eps, 1)
            eps = eps.flip(1) if n else eps
        return eps

    def z(self, k: Float64[Tensor, "B *D"]) -> Float[Tensor, "B *D"]:
        return (k * self.spacing).to(self.dtype)

    def grid(self, k: np.ndarray, batch: int) -> Float64[Tensor, "B D"]:
        return torch.from_numpy(k.astype(np.float64)).view(batch, self.model.prior.code).to(self.device)

    def posterior(self, x: Integer[Tensor, "B C H W"]) -> tuple[Float64[Tensor, "B D"], list[Any]]:
        """The means of q(z | x) rounded to the grid, and the distribution of steps from there.

        Raises:
            FloatingPointError: if the model gives codes that are not finite.
        """
        q = independent(self.model.encode(x))
        if not all(part.isfinite().all() for part in q):
            raise FloatingPointError("the model's codes are not finite")
        mean, scale = (part.double() / self.spacing for part in (q.mean, q.log_scale.exp()))
        # a table gives every value at least 2^-24: were it as wide as the ring, codes would be drawn from far out
        reach = int((TAILS * scale).ceil().clamp(1, self.reach - 1).max()) if scale.numel() else 1
        off, scale = (part.cpu().numpy().ravel() for part in (mean - mean.round(), scale))
        return self.wrap(mean.round()), [self.gaussian(-reach, reach), off, scale]

    def nearest(self, x: Integer[Tensor, "B C H W"]) -> Float64[Tensor, "B D"]:
        """The code of x that is next to the mean."""
        return self.posterior(x)[0]

    def draw(self, stack: Any, x: Integer[Tensor, "B C H W"]) -> Float64[Tensor, "B D"]:
        """A code of x drawn by the bits on the stack, which `give_back` puts there again."""
        middle, steps = self.posterior(x)
        return self.wrap(middle + self.grid(stack.decode(*steps), len(x)))

    def give_back(self, stack: Any, k: Float64[Tensor, "B D"], x: Integer[Tensor, "B C H W"]) -> None:
        """CodecError for a code that `draw` cannot have drawn."""
        middle, steps = self.posterior(x)
        try:
            stack.encode_reverse(symbols(self.wrap(k - middle)), *steps)
        except KeyError as error:
            raise CodecError("damaged: codes that its images do not have") from error

    def push_code(self, stack: Any, k: Float64[Tensor, "B D"]) -> None:
        stack.encode_reverse(symbols(self.noise(k)), self.standard)

    def pop_code(self, stack: Any, batch: int) -> Float64[Tensor, "B D"]:
        return self.code(self.grid(stack.decode(self.standard, batch * self.model.prior.code), batch))

    def table(self, params: Float[Tensor, "B P n"], x: Integer[Tensor, "B c n"]) -> Float64[np.ndarray, "m V"]:
        few = zip(params.split(64, 2), x.split(64, 2), strict=True)  # a whole image of colours takes gigabytes
        probabilities = torch.cat([self.model.likelihood.pmf(*each) for each in few], 2).movedim(1, 2).flatten(0, 1)
        if not probabilities.isfinite().all():
            raise FloatingPointError("the model's probabilities of pixels are not finite")
        return probabilities.double().contiguous().cpu().numpy()  # constriction misreads other strides

    def push_pixels(self, stack: Any, k: Float64[Tensor, "B D"], x: Integer[Tensor, "B C H W"]) -> None:
        """By the same scan as `pop_pixels`: one pass over all pixels would give floats that differ."""
        waves = []

        def look_up(params: Tensor, i: Tensor, j: Tensor) -> Tensor:
            waves.append((params, x[:, :, i, j].contiguous()))
            return waves[-1][1]

        scan(self.model, self.model.decoder.features(self.z(k)), look_up, len(x))
        for params, values in reversed(waves):
            for c in reversed(range(values.shape[1])):
                table = self.table(params, values[:, :c].contiguous())
                stack.encode_reverse(symbols(values[:, c]), self.values, table)

    def pop_pixels(self, stack: Any, k: Float64[Tensor, "B D"]) -> Int[Tensor, "B C H W"]:
        def pop(params: Tensor, i: Tensor, j: Tensor) -> Tensor:
            values = i.new_empty(len(k), 0, len(i))
            for _ in range(self.model.likelihood.channels):
                popped = torch.from_numpy(stack.decode(self.values, self.table(params, values))).to(values)
                values = torch.cat([values, popped.view(len(k), 1, -1)], 1)
            return values

        return scan(self.model, self.model.decoder.features(self.z(k)), pop, len(k))


def symbols(k: Tensor) -> np.ndarray:
    return k.int().cpu().numpy().ravel()
