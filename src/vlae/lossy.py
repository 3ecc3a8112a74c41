"""Codes in a few bytes: an image is the numbers of draws from the prior that its posterior likes best.

Minimal random coding (Havasi et al. 2019): both sides know the same draws from p(z), so that a number is as long as the
prior says, whatever the prior. Here each byte is one of 256 draws, and each after the first is correlated with the one
chosen before, as prior draws that move less and less (Crank-Nicolson proposals): more bytes, a nearer code.
"""

import numpy as np
import torch
from jaxtyping import Float, Int, Integer, UInt8
from scipy.special import ndtri
from torch import Tensor

from vlae.encoder import independent
from vlae.layers import normal_log_prob
from vlae.model import VLAE
from vlae.sampling import scan

CHOICES = 256  # a byte
KEEP = (0.6, 0.8, 0.9, 0.97)  # what a draw keeps of the noise before it, in turn
TOGETHER = 4  # images whose draws are scored at once: what a processor's cache holds


def draws(model: VLAE, stage: int) -> tuple[Float[Tensor, "256 1"], Float[Tensor, "256 D"]]:
    """What each draw of a stage keeps of the noise before, and its fresh noise: the same on every machine."""
    weight = next(model.decoder.parameters())
    raw = np.random.PCG64(stage).random_raw(CHOICES * model.prior.code)
    noise = torch.from_numpy(ndtri(((raw >> np.uint64(11)) + 0.5) * 2.0**-53)).view(CHOICES, -1)
    keep = torch.tensor(KEEP, dtype=torch.float64).repeat(CHOICES // len(KEEP))[:, None]
    keep[0] = 1  # or a byte might make things worse
    return (keep * (stage > 0)).to(weight), noise.to(weight)


@torch.no_grad()
def choose(model: VLAE, x: Integer[Tensor, "B C H W"], count: int) -> UInt8[np.ndarray, "B count"]:
    """The bytes of each image: of 256 draws z, one after the other, those of the largest q(z | x) / p(z).

    Raises:
        FloatingPointError: for a model whose codes are not finite.
    """
    found = []
    for part in x.split(TOGETHER):
        q = independent(model.encode(part.to(next(model.parameters()).device)))
        mean, log_scale = q.mean[:, None], q.log_scale[:, None]
        eps, numbers = torch.zeros_like(mean[:1]), []
        for stage in range(count):
            keep, noise = draws(model, stage)
            each = keep * eps + (1 - keep**2).sqrt() * noise  # [b, 256, D]; b = 1 in the first stage
            z = model.prior.inverse(each.flatten(0, 1))
            _, log_det = model.prior(z)
            log_pz = (normal_log_prob(each.flatten(0, 1)) + log_det).view(len(each), -1)
            z = z.view_as(each)
            log_w = -((z - mean) * torch.exp(-log_scale)).square().sum(2) / 2 - log_pz  # up to a constant of x
            if not log_w.isfinite().all():
                raise FloatingPointError("the model's codes are not finite")
            number = log_w.argmax(1)
            eps = each.expand(len(part), -1, -1)[torch.arange(len(part)), number][:, None]
            numbers.append(number)
        found.append(torch.stack(numbers, 1).to(torch.uint8).cpu().numpy())
    return np.concatenate(found)


@torch.no_grad()
def codes(model: VLAE, numbers: UInt8[np.ndarray, "B count"]) -> Float[Tensor, "B D"]:
    """The codes that `choose` chose."""
    eps = torch.zeros(1, model.prior.code)
    for stage, number in enumerate(torch.from_numpy(numbers.astype(np.int64)).T):
        keep, noise = (part[number] for part in draws(model, stage))
        eps = keep * eps.to(noise) + (1 - keep**2).sqrt() * noise
    return model.prior.inverse(eps)


def likely(model: VLAE, z: Float[Tensor, "B D"]) -> Int[Tensor, "B C H W"]:
    """Images of codes: each value the most likely one after those before it."""

    def most(params: Tensor, i: Tensor, j: Tensor) -> Tensor:
        values = i.new_empty(len(z), 0, len(i))
        for _ in range(model.likelihood.channels):
            values = torch.cat([values, model.likelihood.pmf(params, values).argmax(1, keepdim=True)], 1)
        return values

    with torch.no_grad():
        return scan(model, model.decoder.features(z), most, len(z))
