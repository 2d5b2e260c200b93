"""How much memory does training an adapter take? Plain LoRA, mergeable adapters, and the same written naively, each in
a process of its own: ``python -m benchmarks.adapters --help``."""

from __future__ import annotations

import argparse
import copy
import ctypes
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.engines import Engine, status
from benchmarks.options import fraction, positive
from benchmarks.results import Record, git_commit, show, write_json
from ov_ext.machine import cpu_name

if TYPE_CHECKING:
    from torch import Tensor, nn

PLAIN, SPARSE, QUANT_AWARE = "plain LoRA", "SPARSE", "QUANT_AWARE"
NAIVE_SPARSE, NAIVE_QUANT_AWARE = "naive SPARSE", "naive QUANT_AWARE"
ENTRANTS = (PLAIN, SPARSE, QUANT_AWARE, NAIVE_SPARSE, NAIVE_QUANT_AWARE)
_GROUP = 128
_M_MMAP_THRESHOLD = -3  # <malloc.h>
_COLUMNS = {
    "adapter": "adapter",
    "saved_mib": "kept for backward, MiB|.2f",
    "saved_ratio": "x first|.2f",
    "peak_mib": "peak of a step, MiB|.1f",
    "peak_ratio": "x first|.2f",
}


@dataclass(frozen=True)
class Shape:
    """
    :param hidden: Inputs and outputs of each layer; a multiple of the grid's group of 128.
    :param layers: Layers, one after another.
    :param tokens: Rows of the batch.
    :param rank: Rank of the adapter.
    :param sparsity: Fraction of zeros, 0..1.
    """

    hidden: int
    layers: int
    tokens: int
    rank: int
    sparsity: float


class Training:
    """Adapters on a chain of frozen float32 layers with zeros; one training step at a time.

    :param entrant: One of :data:`ENTRANTS`.
    :param shape: Sizes.
    :param threads: Threads of torch.
    :param seed: Of weights and inputs.
    """

    def __init__(self, entrant: str, shape: Shape, threads: int, seed: int) -> None:
        # Every larger tensor in pages of its own, given back when it is freed: resident memory is what is alive.
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 16)
        import torch

        torch.set_num_threads(threads)
        torch.manual_seed(seed)
        self._model = _adapted(entrant, shape)
        self._x = torch.randn(shape.tokens, shape.hidden)

    def saved(self) -> float:
        """:return: MiB that the graph of a forward keeps for its backward, each storage once. Weights, which are there
        anyhow, do not count; packed masks, which only these adapters have, do."""
        import torch

        buffers = dict(self._model.named_buffers())
        masks = [buffer for name, buffer in buffers.items() if name.endswith(".mask")]
        standing = {_storage(each) for each in (*self._model.parameters(), *buffers.values())}
        kept = {_storage(mask): mask.untyped_storage().nbytes() for mask in masks}

        def note(tensor: Tensor) -> Tensor:
            if _storage(tensor) not in standing:
                kept[_storage(tensor)] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            output = self._model(self._x)  # as long as it is alive, no address is used twice
        assert output.requires_grad
        return sum(kept.values()) / 2**20

    def step(self) -> float:
        """:return: MiB by which resident memory rises at most during forward and backward of a second step."""
        for _ in range(2):
            ctypes.CDLL(None).malloc_trim(0)
            before = status()["VmRSS"]
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
            self._model(self._x).square().mean().backward()
            peak = status()["VmHWM"]
            self._model.zero_grad(set_to_none=True)
        return (peak - before) / 1024


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _adapted(entrant: str, shape: Shape) -> nn.Module:
    """The chain of layers with adapters of random A and B."""
    import nncf
    import torch
    from peft import LoraConfig, get_peft_model
    from torch import nn

    import nncf_ext

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(shape.hidden, shape.hidden) for _ in range(shape.layers))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    base: Any = Chain().requires_grad_(False)
    for layer in base.layers:
        layer.weight[torch.rand_like(layer.weight) < shape.sparsity] = 0.0
    grid = None
    if "QUANT_AWARE" in entrant:
        grid = nncf.compress_weights(
            copy.deepcopy(base),
            mode=nncf.CompressWeightsMode.INT4_SYM,
            group_size=_GROUP,
            all_layers=True,
            dataset=nncf.Dataset([torch.randn(1, shape.hidden)]),
        )
    targets = [f"layers.{index}" for index in range(shape.layers)]
    model = get_peft_model(base, LoraConfig(r=shape.rank, lora_alpha=shape.rank, target_modules=targets))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.01)
    if entrant != PLAIN:
        nncf_ext.make_mergeable(model, nncf_ext.MergeMode[entrant.removeprefix("naive ")], grid=grid)
    if entrant in (NAIVE_SPARSE, NAIVE_QUANT_AWARE):
        base.layers = nn.ModuleList(_naive(layer) for layer in base.layers)
    return model


def _naive(layer: Any) -> nn.Module:
    """The same as a mergeable layer, as autograd does it when simply written down."""
    import torch
    from torch import nn

    class Naive(nn.Module):
        lora_A: Any
        lora_B: Any
        scales: Any

        def __init__(self) -> None:
            super().__init__()
            self.base, self.lora_A, self.lora_B = layer.base_layer, layer.lora_A, layer.lora_B
            self.register_buffer("scales", layer.scales_of("default"))

        def forward(self, x: Tensor) -> Tensor:
            weight = self.base.weight
            low_rank = self.lora_B["default"].weight @ self.lora_A["default"].weight
            delta = layer.scaling["default"] * low_rank * (weight != 0)
            if self.scales is None:
                return self.base(x) + x @ delta.T
            merged = weight + delta
            scales = self.scales.float().repeat_interleave(_GROUP, dim=1)
            with torch.no_grad():
                step = (merged / scales).round().clamp(-8, 7) * scales - merged
            return nn.functional.linear(x, merged + step, self.base.bias)

    made = Naive()
    x = torch.randn(2, layer.base_layer.in_features)
    with torch.no_grad():  # it is the same, or the comparison is void
        torch.testing.assert_close(made(x), layer(x), rtol=1e-2, atol=1e-2)
    return made


def main(arguments: Sequence[str] | None = None) -> list[Record]:
    """Run the benchmark.

    :param arguments: Command line without the program; None: the process's own.
    :return: The records, as written to ``--json``.
    """
    options = _parser().parse_args(arguments)
    shape = Shape(options.hidden, options.layers, options.tokens, options.rank, options.sparsity)
    records: list[Record] = []
    for entrant in options.adapters:
        make = partial(Training, entrant, shape, options.threads, options.seed)
        with Engine(entrant, make) as engine:
            found = {"saved_mib": engine.call("saved"), "peak_mib": engine.call("step")}
        first = records[0] if records else found
        ratios = {f"{what}_ratio": found[f"{what}_mib"] / first[f"{what}_mib"] for what in ("saved", "peak")}
        records.append({"adapter": entrant} | found | ratios | asdict(shape) | _surroundings(options.threads))
    show(f"Adapters on {shape.layers} layers of {shape.hidden} x {shape.hidden}", records, _COLUMNS)
    if options.json:
        write_json(options.json, records)
    return records


def _surroundings(threads: int) -> Record:
    import torch

    return {"torch": torch.__version__, "threads": threads, "cpu": cpu_name(), "git_commit": git_commit()}


def _hidden(text: str) -> int:
    value = positive(text)
    if value % _GROUP:
        raise argparse.ArgumentTypeError(f"a multiple of the group size {_GROUP} is needed, got {text}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adapters", description=__doc__)
    parser.add_argument("--adapters", nargs="+", choices=ENTRANTS, default=list(ENTRANTS), help="ratios: to the first")
    parser.add_argument("--hidden", type=_hidden, default=1024, help="inputs and outputs of each layer")
    parser.add_argument("--layers", type=positive, default=8)
    parser.add_argument("--tokens", type=positive, default=2048, help="of the batch")
    parser.add_argument("--rank", type=positive, default=32)
    parser.add_argument("--sparsity", type=fraction, default=0.5, help="fraction of zeros")
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for the records")
    return parser


if __name__ == "__main__":
    from benchmarks import adapters  # under its own name, by which the engines' processes find Training

    adapters.main()
