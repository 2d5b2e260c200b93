"""samples/07_bootstrap_nas.py and 08_lonas.py from one end to the other, and what the first is made of."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SAMPLES = Path(__file__).parents[2] / "samples"
sys.path.insert(0, str(SAMPLES))

from super_networks import arms, digits, network  # noqa: E402
from super_networks.network import DENSE, SmallResNet  # noqa: E402

pytestmark = pytest.mark.slow

SIZES = {"kernel": 3, "widths": [5, 5, 7, 3], "inner": [[2], [4, 3], []]}


def test_the_parts_of_the_digits_do_not_meet() -> None:
    parts = digits.split(3)
    assert [len(part.images) for part in parts] == [600, 300, 897]
    rows = torch.cat([torch.cat([part.images.flatten(1), part.labels[:, None]], 1) for part in parts])
    whole = torch.cat([torch.cat([part.images.flatten(1), part.labels[:, None]], 1) for part in digits.split(4)])
    assert torch.equal(rows.sort(0)[0], whole.sort(0)[0]) and not torch.equal(
        parts[2].labels, digits.split(4)[2].labels
    )
    images, labels = parts[0].batch(50, torch.Generator().manual_seed(0))
    shifted = torch.nn.functional.pad(parts[0].images, (1, 1, 1, 1))
    windows = [shifted[:, :, down : down + 8, right : right + 8] for down in range(3) for right in range(3)]
    for image, label in zip(images, labels, strict=True):
        same = [(each == image).flatten(1).all(1) for each in windows]
        assert label in parts[0].labels[torch.stack(same).any(0)]


def test_multiplications_and_sizes_of_the_network() -> None:
    torch.manual_seed(0)
    for sizes in (DENSE, network.scaled(0.3), {**SIZES, "inner": [[2], [4, 3], [2]]}):
        model = SmallResNet(sizes).eval()
        counted = 0

        def count(module, _inputs, output) -> None:
            nonlocal counted
            counted += module.weight.numel() * (output[0, 0].numel() if output.ndim == 4 else 1)

        for each in model.modules():
            if isinstance(each, torch.nn.Conv2d | torch.nn.Linear):
                each.register_forward_hook(count)
        model(torch.rand(1, 1, 8, 8))
        assert arms.macs_of(sizes) == counted
        assert network.sizes_of(model) == sizes
    assert abs(arms.macs_of(arms.nearest_scale(100_000)) - 100_000) < 5_000


def test_pruning_keeps_the_channels_of_the_largest_weights() -> None:
    torch.manual_seed(0)
    model = SmallResNet().eval()
    wanted = network.scaled(0.5)
    norms = model.stages[1][0].conv1.weight.detach().abs().flatten(1).sum(1)
    model.stages[1][0].norm1.weight.data.copy_(torch.arange(32))  # tells which filters are left
    small = arms.cut_by_magnitude(model, wanted, torch.rand(1, 1, 8, 8))
    assert network.sizes_of(small) == wanted and type(small) is SmallResNet
    assert torch.equal(small.stages[1][0].norm1.weight.long(), norms.argsort(descending=True)[:16])


def test_a_quick_run_of_bootstrap_nas_shows_everything(tmp_path: Path) -> None:
    command = [sys.executable, str(SAMPLES / "07_bootstrap_nas.py"), "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-3000:]
    for shown in ("searched 0.5", "uniform 0.5", "pruned 0.5", "searched 0.5, INT8", "times faster", "Pictures:"):
        assert shown in done.stdout, shown
    assert done.stdout.count("computes the same") == 2 and "DIFFERS" not in done.stdout
    record = json.loads((tmp_path / "quick/seed-0/record.json").read_text())
    ours, *others = (record[f"{arm} 0.5"]["macs"] for arm in ("searched", "uniform", "pruned"))
    assert ours <= 0.5 * record["dense"]["macs"] and all(abs(each / ours - 1) < 0.1 for each in others)
    assert (tmp_path / "quick/front.png").stat().st_size > 10_000
    assert (tmp_path / "quick/seed-0/points.csv").read_text().count("\n") == len(record["front"]) + 1


def test_a_quick_run_of_lonas_shows_everything(tmp_path: Path) -> None:
    command = [sys.executable, str(SAMPLES / "08_lonas.py"), "--quick", "--steps", "2", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-3000:]
    record = json.loads((tmp_path / "tiny_lm/quick/seed-0-2.json").read_text())
    whole = record["LoRA, dense"]["parameters"]
    assert record["LoNAS, whole"]["parameters"] == whole > record["LoNAS, middle"]["parameters"]
    for target in (0.9, 0.85):
        ours, other = (record[f"{arm} {target:g}"]["parameters"] for arm in ("LoNAS, searched", "MultiPruner + LoRA"))
        assert ours <= target * whole and abs(other / ours - 1) < 0.03
    for name in record:
        assert name in done.stdout, name
