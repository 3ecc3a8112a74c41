"""Commands beside training: `python -m vlae data NAME`, `python -m vlae export RUN NAME`."""

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any


def composed(overrides: list[str]) -> dict[str, Any]:
    """The settings that `train.py` makes of the overrides, from conf/ in the working directory.

    Raises:
        ValueError: if there is no conf/ or the overrides do not fit it.
    """
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    conf = Path("conf").absolute()
    if not (conf / "config.yaml").is_file():
        raise ValueError(f"{conf}: no config.yaml; run this in a checkout of vlae")
    try:
        with initialize_config_dir(str(conf), version_base="1.3"):
            config = OmegaConf.to_container(compose("config", overrides), resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(str(error)) from error
    assert isinstance(config, dict)
    return {str(key): value for key, value in config.items()}


def data(arguments: argparse.Namespace) -> None:
    from vlae.dashboard import show_data
    from vlae.experiment import images_for

    config = composed([f"data={arguments.name}", *arguments.overrides])
    images = images_for(config["data"], config["seed"], ("vlae.", *config["allow"]))
    show_data(arguments.name, images, arguments.output or Path("runs") / "data" / arguments.name)


def export(arguments: argparse.Namespace) -> None:
    from vlae.experiment import export

    export(arguments.folder, arguments.name, shlex.join(["python", "-m", "vlae", *sys.argv[1:]]))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m vlae", description="Commands beside training.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("data", help="what a data set holds, and pictures of each split")
    command.add_argument("name", metavar="NAME", help="of conf/data/NAME.yaml")
    command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings, such as data.root=FOLDER")
    command.add_argument("-o", "--output", type=Path, metavar="FOLDER", help="of the pictures: runs/data/NAME")
    command.set_defaults(run=data)
    command = commands.add_parser("export", help="weights in half precision with a card and test figures")
    command.add_argument("folder", type=Path, metavar="RUN", help="a finished run's folder")
    command.add_argument("name", metavar="NAME", help="of weights/NAME.safetensors")
    command.set_defaults(run=export)
    arguments, more = parser.parse_known_args()
    if more and not (hasattr(arguments, "overrides") and all("=" in text and text[0] != "-" for text in more)):
        parser.error(f"unknown: {' '.join(more)}")
    if more:
        arguments.overrides += more  # those that stand behind an option
    try:
        arguments.run(arguments)  # imports come there, so that --help does not wait for torch
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"{type(error).__name__}: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
