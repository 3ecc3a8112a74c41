"""Trains one model, or with `-m` a sweep: `python train.py experiment=mnist_static model.prior.depth=2`."""

import shlex
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float:
    from vlae import launch  # here, so that --help and --cfg are quick

    config = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert isinstance(config, dict)
    settings, job = {str(key): value for key, value in config.items()}, HydraConfig.get()
    overrides, given = launch.unresolved(job.overrides.task), settings.pop("folder")
    sweep = job.mode == RunMode.MULTIRUN
    if sweep:
        unnamed = tuple(f"{key}=" for key in job.job.config.override_dirname.exclude_keys)
        own = [text for text in overrides if not text.lstrip("+~").startswith(unnamed)]
        folder = Path(job.sweep.dir) / launch.named(own)
        for section in ("wandb", "trainer"):
            if not isinstance(settings[section], dict):
                sys.exit(f"ValueError: {section}={settings[section]}: a section, of which single keys are set")
        settings["wandb"]["group"] = settings["wandb"]["group"] or folder.parent.name
        settings["trainer"]["enable_progress_bar"] = False  # its terminal is a file
        settings["record"] = settings["record"] and f"{settings['record']}/{folder.name}"
    else:
        data = job.runtime.choices["data"]
        folder = Path(str(given or Path("runs") / data / launch.named(launch.lasting(overrides, data))))
    try:
        if sweep and job.runtime.choices["hydra/launcher"] != "submitit_slurm":  # which has started the ranks
            sources = [source.path for source in job.runtime.config_sources if source.provider == "command-line"]
            own = [
                "--config-name",
                str(job.job.config_name),
                *(text for path in sources for text in ("--config-dir", path)),
            ]
            own += [text for text in launch.unresolved(job.overrides.hydra) if text.startswith("hydra.searchpath")]
            return launch.start([sys.executable, __file__, *own, *overrides], settings, folder)

        from vlae.experiment import run

        return launch.score(run(settings, folder, shlex.join(["python", "train.py", *overrides])))
    except Exception as error:
        line = f"{type(error).__name__}: {' '.join(str(error).split())}"  # one line, no traceback
        if sweep:  # a job that fails does not end it
            return launch.fail(folder, settings, line)
        if isinstance(error, (ValueError, OSError, FloatingPointError)):
            sys.exit(line)
        raise


if __name__ == "__main__":
    main()
