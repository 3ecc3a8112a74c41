"""What codes hold: codes of many images, and how well a straight line through them tells the classes."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64, Integer
from torch import Tensor

from vlae.layers import normal_log_prob
from vlae.model import VLAE, evaluating


class Codes(NamedTuple):
    """q(z | x) of each image, and its rate in nats: log q(z | x) - log p(z), averaged over draws of z."""

    mean: Float[Tensor, "B D"]
    scale: Float[Tensor, "B D"]
    rate: Float[Tensor, "B"]


@evaluating
def encode(model: VLAE, x: Integer[Tensor, "B C H W"], eps: Float[Tensor, "K B D"], batch: int = 500) -> Codes:
    """The codes of images; `eps` ~ N(0, 1) gives the K draws by which their rate is averaged. On the CPU.

    Raises:
        ValueError: for images that the model is not for, none, or noise of another shape.
    """
    if not len(x):
        raise ValueError("no images to encode")
    model.refuse_other(x, eps)
    device, parts = next(model.parameters()).device, []
    for k in range(0, len(x), batch):
        q = model.encode(x[k : k + batch].to(device))
        rate = torch.zeros(len(q.mean), device=device)
        for noise in eps[:, k : k + batch].to(device):
            z, log_qz = q.rsample_with_log_prob(noise)
            prior, log_det = model.prior(z)
            rate = rate + (log_qz - normal_log_prob(prior) - log_det) / len(eps)
        parts.append([part.cpu() for part in (q.mean, q.log_scale.exp(), rate)])
    return Codes(*(torch.cat(part) for part in zip(*parts, strict=True)))


def linear_probe(
    train: Float[np.ndarray, "N F"],
    labels: Int64[np.ndarray, " N"],
    test: Float[np.ndarray, "M F"],
    answers: Int64[np.ndarray, " M"],
) -> float:
    """Share of the test images whose class a multinomial logistic regression on standardised features tells."""
    from sklearn.linear_model import LogisticRegression  # seconds to import, and only this needs it
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return float(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(train, labels).score(test, answers)
    )
