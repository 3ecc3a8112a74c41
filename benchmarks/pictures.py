"""Writes CIFAR-10's test images as PNG files in folders of classes, to try `data=images` on."""

import argparse
from pathlib import Path

from PIL import Image

from vlae.datasets import cifar10, default_root


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    images, labels = cifar10(default_root()).test
    assert labels is not None
    for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        path = folder / f"class{label}" / f"{number:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    print(f"{folder}: {len(images):,} pictures")


if __name__ == "__main__":
    main()
