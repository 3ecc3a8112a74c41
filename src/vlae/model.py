"""The VLAE: encoder, prior, decoder, likelihood, and one function of the four.

Letters: x integers, u the same in [-1, 1], z code, eps its noise, h decoder features, q posterior. Axes: B batch, C
channels, H W, D code, F width, P params, V values of a pixel, M components, K importance samples, n pixels of a
wave.
"""

import hashlib
import json
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import torch
from jaxtyping import Float, Integer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vlae.encoder import IAF, Normal
from vlae.layers import normal_log_prob
from vlae.schema import construct, fits

LAST, BEST = "last.ckpt", "best.ckpt"  # in a run's folder checkpoints
P = ParamSpec("P")
T = TypeVar("T")


class Terms(NamedTuple):
    """What an image costs, in nats: -elbo = rate + distortion (bits-back, VLAE equation 6)."""

    log_px: Float[Tensor, "B H W"]
    log_pz: Float[Tensor, "B"]
    log_qz: Float[Tensor, "B"]

    @property
    def rate(self) -> Float[Tensor, "B"]:
        """One-sample estimate of KL(q(z | x) || p(z)); may be negative for a single image."""
        return self.log_qz - self.log_pz

    @property
    def distortion(self) -> Float[Tensor, "B"]:
        return -self.log_px.flatten(1).sum(1)

    @property
    def elbo(self) -> Float[Tensor, "B"]:
        return -self.rate - self.distortion


class VLAE(nn.Module):
    """Variational Lossy Autoencoder (Chen et al., ICLR 2017): the code keeps what the decoder's window cannot model."""

    description: dict[str, Any]  # what `build` was given, for `save`; whether weights saw validation images

    def __init__(self, encoder: nn.Module, prior: nn.Module, decoder: nn.Module, likelihood: nn.Module):
        super().__init__()
        self.encoder, self.prior, self.decoder, self.likelihood = encoder, prior, decoder, likelihood

    def unit(self, x: Integer[Tensor, "B C *n"]) -> Float[Tensor, "B C *n"]:
        """0..levels-1 to [-1, 1], in the precision of the weights."""
        return x.to(next(self.decoder.parameters()).dtype) * (2 / (self.likelihood.levels - 1)) - 1

    def encode(self, x: Integer[Tensor, "B C H W"]) -> Normal | IAF:
        """q(z | x). ValueError for another shape than the model's, or for floats."""
        if x.shape[1:] != self.decoder.shape or x.is_floating_point():
            found = f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape[1:])}"
            raise ValueError(f"images of {found}; the model is for integers {tuple(self.decoder.shape)}")
        return self.encoder(self.unit(x))

    def refuse_other(self, x: Integer[Tensor, "B C H W"], noise: Float[Tensor, "K B D"] | None = None) -> None:
        """ValueError for values that are no levels, or noise that is not for these images; waits for the device."""
        low, high = (int(x.min()), int(x.max())) if x.numel() else (0, 0)
        if low < 0 or high >= self.likelihood.levels:
            raise ValueError(f"images of values {low} to {high}; the model is for 0 to {self.likelihood.levels - 1}")
        if noise is not None and (len(noise) == 0 or noise.shape[1] != len(x)):
            raise ValueError(
                f"noise of shape {tuple(noise.shape)}; K >= 1 draws for each of {len(x)} images are needed"
            )

    def terms(self, x: Integer[Tensor, "#B C H W"], z: Float[Tensor, "B D"], log_qz: Float[Tensor, "B"]) -> Terms:
        params = self.decoder(self.unit(x), self.decoder.features(z))
        eps, log_det = self.prior(z)
        log_px = self.likelihood.log_prob(params, x.expand(len(params), -1, -1, -1))
        return Terms(log_px, normal_log_prob(eps) + log_det, log_qz)

    def forward(self, x: Integer[Tensor, "B C H W"], eps: Float[Tensor, "B D"]) -> Terms:
        """One-sample ELBO of each image, for noise `eps` ~ N(0, 1)."""
        return self.terms(x, *self.encode(x).rsample_with_log_prob(eps))


def evaluating(function: Callable[Concatenate[VLAE, P], T]) -> Callable[Concatenate[VLAE, P], T]:
    """A function of a trained model without gradients, and without dropout where the model is training still."""

    @wraps(function)
    def called(model: VLAE, *arguments: P.args, **settings: P.kwargs) -> T:
        training = [module for module in model.modules() if module.training]
        model.eval()
        try:
            with torch.no_grad():
                return function(model, *arguments, **settings)
        finally:
            for module in training:
                module.training = True

    return called


def build(model: dict[str, Any], shape: tuple[int, int, int], levels: int, allow: tuple[str, ...] = ("vlae.",)) -> VLAE:
    """The model that a `model` section of the configuration describes, for images of `shape` (C, H, W).

    Raises:
        ValueError: for a setting that no constructor takes, naming its key, the value and what is allowed.
    """
    parts = {"code", "encoder", "prior", "decoder", "likelihood"}
    if set(model) != parts:
        raise ValueError(f"model: has {sorted(model)}, needs exactly {sorted(parts)}")
    code = model["code"]
    flat = fits(code, int) and code >= 0
    if not flat and not (fits(code, tuple[int, int, int]) and min(code) > 0):
        raise ValueError(f"model.code={code!r}: must be an integer, 0 (no code) or more, or maps [C, h, w]")
    likelihood = construct(model["likelihood"], "model.likelihood", allow, channels=shape[0], levels=levels)
    vlae = VLAE(
        construct(model["encoder"], "model.encoder", allow, shape=shape, code=code),
        construct(model["prior"], "model.prior", allow, code=code),
        construct(model["decoder"], "model.decoder", allow, shape=shape, code=code, num_params=likelihood.num_params),
        likelihood,
    )
    vlae.description = {"model": model, "shape": list(shape), "levels": levels}
    return vlae.to(memory_format=torch.channels_last)  # convolutions on CPU are a fifth faster


def digest(*tensors: Tensor) -> str:
    """A name for what tensors hold, such as a model's weights."""
    content = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        content.update(tensor.cpu().contiguous().numpy().data)
    return content.hexdigest()


def save(model: VLAE, path: Path, dtype: torch.dtype = torch.float16) -> None:
    """Writes what `load` needs to open the model anywhere: weights as `dtype`, and its description."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.to(dtype).contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, path, metadata={"vlae": json.dumps(model.description)})


WEIGHTS = [folder / "weights" for folder in (Path(__file__).parent, Path(__file__).parents[2])]  # wheel, checkout


def kept(folder: Path) -> Path:
    """Of a run's folder, the checkpoint whose weights count: the best on validation, or without validation the last."""
    best = folder / "checkpoints" / BEST
    return best if best.exists() else best.with_name(LAST)


def load(path: str | Path, allow: tuple[str, ...] = ("vlae.",)) -> VLAE:
    """Opens shipped weights by name, a run's folder, a checkpoint (`.ckpt`) or exported weights (`.safetensors`), ready
    to evaluate.

    Nothing is unpickled but tensors and plain types, and no code runs but that of the packages in `allow`: to open
    a model with your own parts, pass `allow=("vlae.", "yours.")`. Weights are returned in float32, of a checkpoint the
    averaged ones, of a folder those of `kept`.

    Raises:
        FileNotFoundError: if there is no such file, no checkpoint in the folder and no shipped weights of that name.
        ValueError: if the file is not one of ours, or wants a class from outside `allow`.
    """
    shipped = {file.stem: file for folder in WEIGHTS for file in folder.glob("*.safetensors")}
    file = shipped.get(str(path), Path(path))
    what, file = ("a folder without a run's checkpoint", kept(file)) if file.is_dir() else ("no such file", file)
    if not file.is_file():
        raise FileNotFoundError(f"{path}: {what}; shipped weights: {', '.join(sorted(shipped)) or 'none'}")
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as opened:
                config = json.loads(opened.metadata()["vlae"])
                state = {name: opened.get_tensor(name).float() for name in opened.keys()}  # noqa: SIM118
        else:
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
            config, prefix = checkpoint["hyper_parameters"], "model."
            state = {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
        model = build(config["model"], tuple(config["shape"]), config["levels"], allow)
        model.load_state_dict(state)
        model.description |= {key: config[key] for key in ("train_on_validation",) if key in config}
    except UnpicklingError as error:
        raise ValueError(f"{file}: refused, as it holds more than tensors and plain types, or is damaged") from error
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, EOFError, SafetensorError) as error:
        why = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"{file}: not a VLAE that can be opened: {why}") from error
    return model.eval()
