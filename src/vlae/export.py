"""`python -m vlae export`: weights to ship."""

import json
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

from lightning.pytorch import Trainer

from vlae.commands import line, settings
from vlae.dashboard import show
from vlae.data import independent_pixels
from vlae.experiment import evaluated, prepare, quiet
from vlae.model import kept, load, save
from vlae.records import commit, write


def export(run: str, allow: Sequence[str], name: str) -> None:
    """Stores a finished run's weights in half precision as weights/<name>.safetensors with a card, weights/<name>.md,
    and results/<name>_weights.json: test figures of the stored weights, evaluated in float32.

    Raises:
        FileNotFoundError: if `run` is not the folder of a finished run.
    """
    quiet()
    folder = Path(run)
    if not (folder / "metrics.json").exists():
        raise FileNotFoundError(f"{folder}: no finished run (it has no metrics.json)")
    begun, code, path = time.time(), commit(), Path("weights") / f"{name}.safetensors"
    started = datetime.now(UTC).isoformat(timespec="seconds")
    config, trained = settings(folder / "config.json", allow), json.loads((folder / "metrics.json").read_text())
    asked, images, model = prepare(config)
    packages = ("vlae.", *allow)
    trainer = Trainer(devices=1, logger=False, use_distributed_sampler=False, enable_checkpointing=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent) as place:  # older weights stay until these are measured
        new = Path(place, path.name)
        own = load(kept(folder), packages)  # not by name: weights of that name may be there
        own.description["train_on_validation"] = images.train_on_validation
        save(own, new)
        model.model.load_state_dict(load(new, packages).state_dict())
        metrics = dict(trainer.test(model, images, verbose=False)[0])
        new.replace(path)
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
    parts = "training and validation parts" if images.train_on_validation else "training part"
    card = f"""# {name}

{record["parameters"]:,} weights in half precision, {path.stat().st_size / 2**20:.2f} MiB: `vlae.load("{name}")`.
Trained on the {parts} of {record["data"]} (binarisation: {record["binarisation"]}), seed {record["seed"]}:
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
