"""Trains one model, or with `-m` a sweep: `python train.py experiment=mnist_static model.prior.depth=2`."""

import os
import shlex
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch starts: shared cores are many times faster with it


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float:
    from vlae import launch  # here, so that --help and --cfg are quick

    config = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert isinstance(config, dict)
    settings, hydra_settings = {str(key): value for key, value in config.items()}, HydraConfig.get()
    overrides, given = launch.unresolved(hydra_settings.overrides.task), settings.pop("folder")
    sweep = hydra_settings.mode == RunMode.MULTIRUN
    if sweep:
        common = [f"{key}=" for key in hydra_settings.job.config.override_dirname.exclude_keys]
        own = [text for text in overrides if not text.lstrip("+~").startswith(tuple(common))]
        folder = Path(hydra_settings.sweep.dir) / launch.named(own)
        settings["wandb"]["group"] = settings["wandb"]["group"] or folder.parent.name
        settings["trainer"]["enable_progress_bar"] = False  # its terminal is a file
        if not any(name in os.environ for name in launch.EXTERNAL):
            return launch.start(__file__, settings, overrides, folder)
    else:
        data = hydra_settings.runtime.choices["data"]
        folder = Path(given or Path("runs") / data / launch.named(launch.lasting(overrides, data)))

    from vlae.experiment import run

    try:
        return launch.score(run(settings, folder, shlex.join(["python", "train.py", *overrides])))
    except (ValueError, OSError, FloatingPointError) as error:
        line = f"{type(error).__name__}: {' '.join(str(error).split())}"  # one line, no traceback
        if sweep:  # a job that fails does not end it
            return launch.fail(folder, settings, line)
        sys.exit(line)


if __name__ == "__main__":
    main()
