"""Time of layers that skip inputs, at several fractions of skipped inputs: stock OpenVINO, our dense form, skipping.

``python -m benchmarks.activations --shapes 8192x2048 2048x8192 --rounds 15 --plot curve.png``: outputs x inputs. All
arms run in OpenVINO, on the same weights, in turns; each is checked against numpy before it is timed. ``--decode``
times tokens of a whole 1B model instead, the inputs of whose MLPs are skipped.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset13 as ops

import ov_ext
from benchmarks.arms import Settings, candidates, compile_model, pack
from benchmarks.decoders import Generator, OpenVinoDecoder
from benchmarks.llama import LLAMA_1B, TINY, RandomLlama, decoder
from benchmarks.options import add_shared, fraction, positive
from benchmarks.timing import fastest, interleave, paired_ratio
from benchmarks.weights import linear, random_weight
from ov_ext.cpu_plugin.support.weight import Weight

_EVERY = ov_ext.SparseActivationPolicy(min_speedup=0.0, min_weights=0)
_STOCK, _DENSE, _SKIPPING = "stock", "ours, dense", "ours, skipping"
_LARGEST = 0.03  # error of 8-bit activations, relative to the largest output


def layers(weights: Sequence[Weight], skipping: bool) -> ov.Model:
    """:return: Layers that read one ``x [rows, K]``; skipping: behind the pattern, with threshold 1."""
    x = ops.parameter([-1, weights[0].shape[1]], np.float32, name="x")
    source: Any = x
    if skipping:
        near = ops.less_equal(ops.abs(x), ops.constant(np.float32(1)))
        source = ops.select(near, ops.constant(np.float32(0)), x)
    results = [ops.result(linear(source.output(0), weight, f"layer{i}")) for i, weight in enumerate(weights)]
    return ov.Model(results, [x], "layers")


def inputs(rng: np.random.Generator, rows: int, k: int, skipped: float) -> np.ndarray:
    """:return: ``[rows, k]`` float32: of each row that fraction is below 1 in magnitude, the others are above."""
    small = np.argsort(rng.random((rows, k)), axis=1) < round(skipped * k)
    size = np.where(small, rng.uniform(0.0, 0.99, (rows, k)), rng.uniform(1.01, 3.0, (rows, k)))
    return (size * rng.choice([-1, 1], (rows, k))).astype(np.float32)


def compiled(weights: Sequence[Weight], kind: str, base: Settings) -> dict[tuple[str, str], ov.CompiledModel]:
    """:return: The arms, by engine and setting."""
    arms = {}
    for settings in candidates(base, kind, True):
        arms[_STOCK, settings.name] = compile_model(layers(weights, False), settings)
    dense = layers(weights, False)
    pack(dense)
    skipping, report = ov_ext.pack_sparse_activations(layers(weights, True), _EVERY)
    assert len(report.replaced) == len(weights)
    for name, model in ((_DENSE, dense), (_SKIPPING, skipping)):
        arms[name, ""] = compile_model(model, candidates(base, kind, False)[0])
    return arms


def check(arms: dict[tuple[str, str], ov.CompiledModel], weight: Weight, x: np.ndarray) -> None:
    """Compare the first layer of every arm with numpy.

    :raises RuntimeError: One is wrong.
    """
    matrix = weight.dequantize().astype(np.float64).T
    for (name, _), model in arms.items():
        used = np.where(np.abs(x) <= 1, 0, x) if name == _SKIPPING else x
        expected = used @ matrix
        error = np.abs(model(x)[0] - expected).max() / np.abs(expected).max()
        if not error < _LARGEST:
            raise RuntimeError(f"{name} is wrong: relative error {error:.3f}")


def turn(model: ov.CompiledModel, x: np.ndarray, calls: int) -> Callable[[], list[float]]:
    """:return: What runs a model once untimed and ``calls`` times timed."""
    request = model.create_infer_request()

    def run() -> list[float]:
        seconds = []
        for call in range(calls + 1):
            begin = perf_counter()
            request.infer(x, share_inputs=True, share_outputs=True)
            if call:
                seconds.append(perf_counter() - begin)
        return seconds

    return run


def skipping_mlps(stock: ov.Model, skipped: float, tokens: int = 32) -> ov.Model:
    """Put the pattern in front of a decoder's MLPs, with thresholds that skip a fraction of inputs of random tokens.

    :param stock: What :func:`benchmarks.llama.decoder` gives; it stays as it is.
    :return: A copy.
    """
    model = stock.clone()
    parts = [node for node in model.get_ordered_ops() if node.get_type_name() == "MatMul"]
    mlps = [node for node in parts if node.get_friendly_name().split(".")[-1] in ("gate_proj", "up_proj", "down_proj")]
    looking = stock.clone()
    names = {node.get_friendly_name(): node for node in looking.get_ops()}
    inputs_of = [node.get_friendly_name().replace("up_proj", "gate_proj") for node in mlps]  # up reads what gate reads
    ports = {name: names[name].input_value(0) for name in inputs_of}
    looking.add_outputs([*ports.values()])
    ids = np.random.default_rng(0).integers(0, TINY.vocab, (1, tokens))
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(tokens)[None]}
    found = compile_model(looking, Settings())({**feed, "beam_idx": np.zeros(1, np.int32)})
    seen = {name: found[1 + i] for i, name in enumerate(ports)}
    for node, name in zip(mlps, inputs_of, strict=True):
        x = node.input_value(0)
        threshold = ops.constant(np.float32(np.quantile(np.abs(seen[name]), skipped)))
        near = ops.less_equal(ops.abs(x), threshold)
        node.input(0).replace_source_output(ops.select(near, ops.constant(np.float32(0)), x).output(0))
    return model


def decode(options: argparse.Namespace) -> None:
    """Print milliseconds a token of a whole model, for each kind and fraction."""
    base = Settings(options.threads, options.precision)
    for kind in options.kinds:
        stock = decoder(RandomLlama(TINY if options.quick else LLAMA_1B, kind, 0.0))
        models = {_STOCK: compile_model(stock, candidates(base, kind, True)[0])}
        dense = stock.clone()
        pack(dense)
        models[_DENSE] = compile_model(dense, candidates(base, kind, False)[0])
        for skipped in options.skipped:
            model, report = ov_ext.pack_sparse_activations(
                skipping_mlps(stock, skipped), ov_ext.SparseActivationPolicy(skipped=skipped, min_weights=0)
            )
            pack(model)
            models[_SKIPPING] = compile_model(model, candidates(base, kind, False)[0])
            generators = {
                name: Generator(lambda each=each: OpenVinoDecoder(each), TINY.vocab)  # type: ignore[misc]
                for name, each in models.items()
            }
            seconds = interleave(
                {name: lambda each=each: each.generate(32, 12)[1] for name, each in generators.items()},  # type: ignore[misc]
                options.rounds,
            )
            times = {name: 1e3 * float(np.median(each)) for name, each in seconds.items()}
            ratio, over_stock = (paired_ratio(seconds[name], seconds[_SKIPPING]) for name in (_DENSE, _STOCK))
            print(
                f"{kind} decoder, {len(report.replaced)} of {len(report.layers)} layers skip {skipped:.0%}: ms a token "
                + ", ".join(f"{name} {time:.1f}" for name, time in times.items())
                + f"; dense / skipping {ratio.median:.2f} ({ratio.low:.2f} - {ratio.high:.2f}), "
                f"stock / skipping {over_stock.median:.2f} ({over_stock.low:.2f} - {over_stock.high:.2f})",
                flush=True,
            )


def draw(curves: dict[str, list[tuple[float, float]]], path: Path) -> None:
    """Draw the gain over the dense form against the fraction of skipped inputs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for label, points in curves.items():
        axes.plot(*zip(*points, strict=True), marker="o", ms=4, label=label)
    axes.axhline(1, color="black", lw=1)
    axes.set(xlabel="fraction of inputs that are skipped", ylabel="time of our dense form / of skipping")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)


def main() -> None:
    """Print a line for each kind, shape and fraction."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_shared(parser)
    parser.add_argument("--shapes", nargs="+", default=["8192x2048", "2048x8192"], help="outputs x inputs")
    parser.add_argument("--skipped", nargs="+", type=fraction, default=[0.0, 0.25, 0.5, 0.75, 0.9])
    parser.add_argument("--rows", type=positive, default=1)
    parser.add_argument("--mib", type=positive, default=64, help="of stock weights: more than a cache holds")
    parser.add_argument("--rounds", type=positive, default=15)
    parser.add_argument("--calls", type=positive, default=5)
    parser.add_argument("--plot", type=Path, help="PNG file of the curves")
    parser.add_argument("--decode", action="store_true", help="a whole 1B model instead of layers")
    options = parser.parse_args()
    if options.decode:
        decode(options)
        return
    base = Settings(options.threads, options.precision)
    curves: dict[str, list[tuple[float, float]]] = {}
    for kind in options.kinds:
        for shape in options.shapes:
            n, k = (128, 256) if options.quick else map(int, shape.split("x"))
            rng = np.random.default_rng(options.seed)
            count = max(1, options.mib * 2**20 * 8 // (n * k * {"bf16": 16, "int8": 8, "int4": 4}[kind]))
            weights = [random_weight(kind, n, k, 0.0, rng) for _ in range(2 if options.quick else count)]
            arms = compiled(weights, kind, base)
            for skipped in options.skipped:
                x = inputs(rng, options.rows, k, skipped)
                check(arms, weights[0], x)
                turns = {name: turn(model, x, options.calls) for name, model in arms.items()}
                seconds = interleave(turns, 1 if options.quick else options.rounds)
                stock = fastest({name: each for name, each in seconds.items() if name[0] == _STOCK})
                ours, dense = seconds[_SKIPPING, ""], seconds[_DENSE, ""]
                against = paired_ratio(dense, ours), paired_ratio(seconds[stock], ours)
                label = f"{kind} {n}x{k}"
                curves.setdefault(label, []).append((skipped, against[0].median))
                times = [1e6 * float(np.median(each)) / len(weights) for each in (seconds[stock], dense, ours)]
                ratios = (f"{each.median:.2f} ({each.low:.2f} - {each.high:.2f})" for each in against)
                print(
                    f"{label:16} rows {options.rows} skipped {skipped:4.0%}  us a layer: stock {times[0]:7.0f}, "
                    f"dense {times[1]:7.0f}, skipping {times[2]:7.0f};  dense / skipping {next(ratios)}, "
                    f"stock / skipping {next(ratios)}",
                    flush=True,
                )
    if options.plot is not None:
        draw(curves, options.plot)


if __name__ == "__main__":
    main()
