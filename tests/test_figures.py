"""What a figure says is what it was given."""

import re
from pathlib import Path

import numpy as np

from vlae.figures import where_bits_go


def test_where_bits_go(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sizes = [1, 2, 40, 57]
    each = np.concatenate([rng.uniform((-400, 90, 380), (-300, 110, 400), (size, 3)) for size in sizes])
    gains = np.stack([part.sum(0) for part in np.split(each, np.cumsum(sizes)[:-1])])
    files = {"ours": 3_000, "PNG": 8_765, "other": 2_345}
    path = tmp_path / "picture.svg"
    where_bits_go(sizes, gains, gains.sum(1) - 7, 1200, files, path)
    said = [text.strip() for text in re.findall("<!-- (.*?) -->", path.read_text())]  # each text, before its outlines
    back, pixels, code = each.mean(0)
    header = 240 - 12 - pixels - code - back  # the file's 24,000 bits are of 100 images
    for bits in (pixels, code, back, 12, header, 240):
        assert f"{bits:.1f}" in said
    assert f"-ELBO: {pixels + code + back - 7 * len(sizes) / 100:.1f}" in said
    assert f"{code + back:.1f} together" in "".join(said)
    assert [text for text in said if text in ("8,765", "3,000", "2,345")] == ["8,765", "3,000", "2,345"]
