"""Commands on finished runs: `python -m vlae export RUN NAME`."""

import argparse
import shlex
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m vlae", description="Commands on finished runs.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    export = commands.add_parser("export", help="weights in half precision with a card and test figures")
    export.add_argument("folder", type=Path, metavar="RUN", help="a finished run's folder")
    export.add_argument("name", metavar="NAME", help="of weights/NAME.safetensors")
    arguments = parser.parse_args()

    from vlae import experiment  # here, so that --help does not wait for torch

    try:
        experiment.export(arguments.folder, arguments.name, shlex.join(["python", "-m", "vlae", *sys.argv[1:]]))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"{type(error).__name__}: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
