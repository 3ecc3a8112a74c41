"""Trains one model, or with `-m` a sweep: `python train.py experiment=mnist_static model.prior.depth=2`."""

import hashlib
import os
import shlex
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch starts: shared cores are many times faster with it

UNNAMED = (
    "trainer.max_",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.enable_",
    "wandb.",
    "record",
    "folder",
)


def run_folder(overrides: list[str], data: str) -> Path:
    """runs/<data>/<overrides>: what was asked for, less what may change when the run goes on."""
    asked = [text.lstrip("+~") for text in overrides]
    named = ",".join(sorted(text for text in asked if not text.startswith(UNNAMED) and text != f"data={data}"))
    name = named.replace("/", "%") or "default"
    if len(name) > 120:
        name = f"{name[:110]}~{hashlib.blake2b(name.encode(), digest_size=4).hexdigest()}"
    return Path("runs") / data / name


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float:
    from vlae.experiment import run  # here, so that --help and --cfg do not wait for torch

    config = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert isinstance(config, dict)
    choices = HydraConfig.get().runtime.choices
    folder = Path(config.pop("folder") or run_folder(list(HydraConfig.get().overrides.task), choices["data"]))
    command = "python train.py " + " ".join(map(shlex.quote, HydraConfig.get().overrides.task))
    try:
        if HydraConfig.get().mode == RunMode.MULTIRUN and config["trainer"]["devices"] != 1:
            raise ValueError(
                f"trainer.devices={config['trainer']['devices']}: the jobs of a sweep train on one device each, "
                "as other ranks would run a sweep of their own; start such runs one by one"
            )
        metrics = run({str(key): value for key, value in config.items()}, folder, command.strip())
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            raise  # or the other jobs of the sweep would not run
        sys.exit(f"{type(error).__name__}: {' '.join(str(error).split())}")  # one line, no traceback
    return metrics["val/nelbo"] if "val/nelbo" in metrics else metrics["test/nelbo"]


if __name__ == "__main__":
    main()
