"""`python -m vlae COMMAND`: what is there beside training."""

import argparse
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
    from vlae.data import images_for

    config = composed([f"data={arguments.name}", *arguments.overrides])
    images = images_for(config["data"], config["seed"], ("vlae.", *config["allow"]))
    show_data(arguments.name, images, arguments.output or Path("runs") / "data" / arguments.name)


def report(arguments: argparse.Namespace) -> None:
    from vlae.report import report

    page, figures = report(arguments.folder)
    print(f"{page}, and {len(figures)} figures in {arguments.folder / 'report'}")


def dashboard(arguments: argparse.Namespace) -> None:
    from vlae.workspace import dashboard

    dashboard(arguments.entity, arguments.project, arguments.output)


def export(arguments: argparse.Namespace) -> None:
    from vlae.export import export

    export(arguments.model, arguments.allow, arguments.name)


def trained(arguments: argparse.Namespace) -> None:
    from vlae import commands

    settings = {key: value for key, value in vars(arguments).items() if key not in ("call", "command", "model")}
    getattr(commands, arguments.command)(arguments.model, **settings)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m vlae", description="Data sets and trained models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    command = commands.add_parser("data", help="what a data set holds, and pictures of each split")
    command.add_argument("name", metavar="NAME", help="of conf/data/NAME.yaml")
    command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings, such as data.root=FOLDER")
    command.add_argument("-o", "--output", type=Path, metavar="FOLDER", help="of the pictures: runs/data/NAME")
    command.set_defaults(call=data)
    command = commands.add_parser("report", help="a sweep, or any folder of runs, as one page: report.html")
    command.add_argument("folder", type=Path, metavar="FOLDER", help="that holds the folders of the runs")
    command.set_defaults(call=report)
    command = commands.add_parser("dashboard", help="what W&B shows of a project: as JSON, and saved there")
    command.add_argument("--entity", help="an account or a team of W&B; without one nothing is sent")
    command.add_argument("--project", default="vlae")
    command.add_argument("-o", "--output", type=Path, metavar="FILE", default=Path("runs") / "dashboard.json")
    command.set_defaults(call=dashboard)

    run, named, images, seeded = (argparse.ArgumentParser(add_help=False) for _ in range(4))
    text = "a run's folder, a checkpoint in it, or shipped weights by name"
    run.add_argument("model", metavar="RUN", help=text)
    text = "a package besides vlae whose code the run may call; may be given again"
    run.add_argument("--allow", metavar="PACKAGE", action="append", default=[], help=text)
    text = "what shipped weights were trained on, if not what they are named after"
    named.add_argument("--data", metavar="NAME", help=text)
    text = "train, validation, test (default), or pictures of the model's size: files, folders, .npy, .npz"
    images.add_argument("sources", nargs="*", metavar="IMAGES", help=text)
    seeded.add_argument("--seed", type=int, default=0, help="of the noise (default 0)")

    def add(name: str, text: str, *parents: argparse.ArgumentParser, output: str = "") -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, parents=[run, *parents])
        command.set_defaults(call=trained)
        if output:
            command.add_argument("-o", "--output", type=Path, help=output)
        return command

    command = add("evaluate", "log p(x) by importance sampling: a table, and evaluate.json", named)
    command.add_argument("--split", default="test", help="train, validation or test (default)")
    command.add_argument("--samples", type=int, default=4096, help="codes an image (default 4096)")
    command.add_argument(
        "--images", type=int, metavar="N", dest="part", help="of the split, drawn by seed 0; all if not given"
    )
    command.add_argument("--batch", type=int, help="images x samples at once")
    folder = "a folder to write to, instead of beside the run"
    add("sample", "pictures of what a model makes up", seeded, output=folder)
    text = "pictures and figures of what its codes keep of images"
    add("reconstruct", text, images, named, seeded, output=folder)
    text = "codes of images: codes.npz with mean, scale, rate and labels"
    add("encode", text, images, named, output="a file or folder to write to, instead of beside the run")
    text = "images as one file, about as long as -ELBO says, next to other formats"
    command = add("compress", text, images, named, output="the file, instead of one beside the run")
    text = "so many an image, for its code alone: the texture is drawn anew"
    command.add_argument("--lossy", type=int, default=0, metavar="BYTES", help=text)
    text = "computed in float64, slower, so that other kinds of processors open it too"
    command.add_argument("--portable", action="store_true", help=text)
    command.add_argument("--samples", type=int, default=16, help="codes an image, for the table (default 16)")
    text = "an .npz, or a new folder for PNGs, instead of an .npz beside FILE"
    command = add("decompress", "the images of a file that compress wrote with the same model", seeded, output=text)
    command.add_argument("file", type=Path, metavar="FILE")
    text = "of a lossy file, the most likely pixels one by one instead of drawn ones"
    command.add_argument("--likely", action="store_true", help=text)
    command = add("export", "weights in half precision with a card and test figures")
    command.add_argument("name", metavar="NAME", help="of weights/NAME.safetensors")
    command.set_defaults(call=export)
    arguments, more = parser.parse_known_args()  # `more`: also what may be named again and stands behind an option
    if hasattr(arguments, "sources"):
        known, arguments.sources = True, [*arguments.sources, *more] or ["test"]
    elif known := hasattr(arguments, "overrides") and all("=" in text for text in more):
        arguments.overrides += more
    if more and (not known or any(text.startswith("-") for text in more)):
        parser.error(f"unknown: {' '.join(more)}")
    try:
        arguments.call(arguments)  # imports come there, so that --help does not wait for torch
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"{type(error).__name__}: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
