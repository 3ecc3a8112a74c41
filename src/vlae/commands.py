"""What `python -m vlae` does with trained models: score, draw, encode, export."""

import json
import os
import shlex
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import Trainer
from rich.console import Console

from vlae.codes import encode as codes_of
from vlae.dashboard import show
from vlae.data import Images, generator, independent_pixels
from vlae.datasets import Part, Splits
from vlae.evaluation import evaluate as score
from vlae.evaluation import refuse_other
from vlae.experiment import evaluated, images_for, kept, prepare, quiet
from vlae.folder import alike
from vlae.gallery import PICTURES, draw, plot
from vlae.model import VLAE, load, save
from vlae.records import commit, write


def opened(run: str, data: str | None = None) -> tuple[VLAE, Images, Path]:
    """The model, its images and the folder for results of a run's folder, of a checkpoint in it, or of weights.

    Weights do not say what they were trained on: `data` names the set, by default the one they are named after.

    Raises:
        FileNotFoundError: if there is no such run.
        ValueError: for a damaged file or an unknown data set.
    """
    path, allow = Path(run), ("vlae.",)
    if not path.is_dir() and path.suffix != ".ckpt":
        model, name = load(run), data or path.stem
        section = {"_target_": f"vlae.datasets.{name}", "root": None, "batch_size": 1, "eval_batch_size": 1}
        return model, images_for(section, 0, allow), Path("runs") / path.stem
    folder = path if path.is_dir() else path.parent.parent
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{run}: no run, as there is no {file}")
    if data:
        raise ValueError(f"--data={data}: {folder} was trained on its own data; leave it out")
    try:
        config = json.loads(file.read_text())
        section, seed, allow = config["data"], config["seed"], ("vlae.", *config["allow"])
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{file}: not the settings of a run: {error}") from error
    return load(kept(folder) if path.is_dir() else path, allow), images_for(section, seed, allow), folder


def line() -> str:
    """The command being run."""
    return shlex.join(["python", "-m", "vlae", *sys.argv[1:]])


def evaluate(run: str, data: str | None, split: str, samples: int, batch: int | None) -> None:
    """Log-likelihood by importance sampling: a table, and evaluate.json beside the run."""
    model, images, folder = opened(run, data)
    name = getattr(images.dataset, "func", images.dataset).__name__
    score(model, images, split, samples, batch, folder, {"command": line(), "data": name})


def shown(model: VLAE, images: Images, source: str) -> Part:
    """A split of the model's data set, or pictures of exactly the model's size, as a file or a folder of them.

    Raises:
        ValueError: if it is neither, or the pictures do not fit the model.
    """
    splits, shape = Splits._fields[:3], model.decoder.shape
    if source not in splits:
        if not Path(source).exists():
            raise ValueError(f"{source}: neither {', '.join(splits)} nor a file or folder of pictures")
        return Part(alike(Path(source), shape, model.likelihood.levels))
    refuse_other(model, images.shape, images.levels)
    return images.part(source)  # type: ignore[arg-type]


def sample(run: str, seed: int, output: Path | None) -> None:
    """Draws samples.png, beside the run or in `output`."""
    model, _, folder = opened(run)
    x = torch.zeros(8, *model.decoder.shape, dtype=torch.long)
    draw(model, x, ["samples"], seed, output or folder)
    say(f"{(output or folder) / 'samples.png'}")


def reconstruct(run: str, data: str | None, source: str, seed: int, output: Path | None) -> None:
    """Draws, beside the run or in `output`, what codes keep of images, in every way of `vlae.gallery`."""
    model, images, folder = opened(run, data)
    part = shown(model, images, source)
    if len(part.images) < 2:
        raise ValueError(f"{source}: {len(part.images)} picture, at least 2 are needed")
    chosen = torch.randperm(len(part.images), generator=generator("shown", seed))[:1000]
    x, folder = part.images[chosen].long(), output or folder
    written = [folder / f"{name}.png" for name in draw(model, x, PICTURES, seed, folder)]
    try:
        written += plot(model, x, seed, folder)
    except ImportError as error:
        say(f"no figures of bits, noise and window: {error}")
    say(", ".join(map(str, written)))


def encode(run: str, data: str | None, source: str, output: Path | None) -> None:
    """Writes codes.npz: arrays mean and scale [N D], rate [N] in nats, and labels [N] where there are any.

    Rates are by one draw of each code; of a split, by the draw that training and testing use.
    """
    model, images, folder = opened(run, data)
    part, path = shown(model, images, source), output or folder / "codes.npz"
    noise = generator("eps", images.seed, source if source in Splits._fields[:3] else "pictures")
    codes = codes_of(model, part.images, torch.randn(1, len(part.images), model.prior.code, generator=noise))
    arrays = {name: tensor.numpy() for name, tensor in codes._asdict().items()}
    if part.labels is not None:
        arrays["labels"] = part.labels.numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(path.name + ".part").open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    os.replace(file.name, path)
    say(f"{path}: {len(part.images):,} codes of {model.prior.code} numbers, mean rate {codes.rate.mean():.3f} nats")


def say(line: str) -> None:
    Console().print(line, soft_wrap=True, highlight=False)


def export(run: str, name: str) -> None:
    """Stores a finished run's weights in half precision as weights/<name>.safetensors with a card, weights/<name>.md,
    and results/<name>_weights.json: test figures of the stored weights, evaluated in float32.

    Raises:
        FileNotFoundError: if `folder` holds no finished run.
    """
    quiet()
    folder = Path(run)
    if not (folder / "metrics.json").exists():
        raise FileNotFoundError(f"{folder}: no finished run (it has no metrics.json)")
    begun, code, path = time.time(), commit(), Path("weights") / f"{name}.safetensors"
    started = datetime.now(UTC).isoformat(timespec="seconds")
    config, trained = (json.loads((folder / f"{file}.json").read_text()) for file in ("config", "metrics"))
    asked, images, model = prepare(config)
    allow = ("vlae.", *asked.allow)
    save(load(kept(folder), allow), path)
    model.model.load_state_dict(load(path, allow).state_dict())
    trainer = Trainer(devices=1, logger=False, use_distributed_sampler=False, enable_checkpointing=False)
    metrics = dict(trainer.test(model, images, verbose=False)[0])
    metrics["independent_pixels/bits_per_dim"] = independent_pixels(images.splits)
    record = {
        "name": f"{name}_weights",
        "command": line(),
        "commit": code,
        "date": started,
        **evaluated(asked, images, model, trainer),
        **{key: trained[key] for key in ("steps", "images_seen")},
        "wall_s": round(time.time() - begun, 1),
        "metrics": metrics,
    }
    write(Path("results") / f"{name}_weights.json", record)
    figures = "\n".join(f"| {key} | {value:.4f} |" for key, value in metrics.items())
    card = f"""# {name}

{record["parameters"]:,} weights in half precision, {path.stat().st_size / 2**20:.2f} MiB: `vlae.load("{name}")`.
Trained on {record["data"]} (binarisation: {record["binarisation"]}), seed {record["seed"]}:
{trained["images_seen"]:,} images seen.

Figures of the stored weights in float32 on the test split: one-sample bounds in nats per image, or bits/dim.
Measured by `{record["command"]}` at commit {code}, {record["hardware"]}.

| figure | value |
| --- | --- |
{figures}

```json
{json.dumps(config["model"], indent=2)}
```
"""
    path.with_suffix(".md").write_text(card)
    show(metrics, f"{path}, {path.with_suffix('.md')} and results/{name}_weights.json")
