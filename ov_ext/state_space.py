"""Converts Mamba and Mamba-2 to a stateful IR. One graph takes prompts and single tokens; states are variables.

The model is traced by torch. A traced scan would be fixed to the number of tokens of the example. So each scan is a
torch operation of our own while tracing, and a conversion rule builds it from OpenVINO's operations for any number of
tokens. A mixer without a state space (Mamba-Shedder removed it) keeps the state of its convolution only.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import openvino as ov
from openvino import Node
from openvino import opset15 as opset

from ov_ext.stand_in import computing_in_float32, patch_16bit, stand_in

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MODEL_TYPES = ("mamba", "falcon_mamba", "mamba2")
CHUNK = 64
"""Number of tokens that Mamba-2's scan computes by one matrix product."""
_END = np.iinfo(np.int64).max  # a slice up to here goes to the end


def convert_state_space_model(model: torch.nn.Module) -> ov.Model:
    """Convert a causal language model of Mamba mixers, whole or with blocks and state spaces removed.

    :param model: A transformers model of one of :data:`MODEL_TYPES`. Weights in half precision stay so.
    :return: Stateful IR. Inputs: ``input_ids`` ``[sequences, tokens]``; ``attention_mask``, whose last columns are
        those of the tokens; ``beam_idx`` ``[sequences]``, which rows of the states to go on with. Output: ``logits``
        ``[sequences, tokens, vocabulary]`` float32. Variables: of each layer ``conv`` ``[sequences, channels,
        kernel]``, and ``ssm`` ``[sequences, heads, states, channels]`` (Mamba-1: ``[sequences, channels, states]``)
        where it has a state space; float32.
    :raises ValueError: The model is of another kind.
    """
    if getattr(model.config, "model_type", None) not in MODEL_TYPES:
        raise ValueError(f"{type(model).__name__} has no Mamba mixers. Models of {', '.join(MODEL_TYPES)} have.")
    import torch
    from openvino.frontend.pytorch import ConversionExtension

    model = stand_in(model)
    backbone: Any = model.backbone
    mixers = [block.mixer for block in backbone.layers]
    shapes = {f"conv.{index}": _conv_shape(mixer) for index, mixer in enumerate(mixers)}
    selective = [mixer for mixer in mixers if hasattr(mixer, "A_log")]
    shapes |= {f"ssm.{index}": _ssm_shape(mixer) for index, mixer in enumerate(selective)}
    ids = torch.ones(2, 3, dtype=torch.long)
    example = (ids, torch.ones_like(ids), *(torch.zeros(2, *shape) for shape in shapes.values()))
    _operations()
    extensions = [ConversionExtension(f"ov_ext::{name}", rule) for name, rule in _RULES.items()]
    decoder = _decoder(model)
    with torch.no_grad(), computing_in_float32(model) as half:
        if half:
            patch_16bit(decoder)
        ir = ov.convert_model(decoder, example_input=example, extension=extensions)
    past, present = ([f"cache_params.{when}.{name}" for name in shapes] for when in ("past", "present"))
    for port, name in zip(ir.inputs, ("input_ids", "attention_mask", *past), strict=True):
        port.get_tensor().set_names({name})
        port.get_node().set_friendly_name(name)
    for port, name in zip(ir.outputs, ("logits", *present), strict=True):
        port.get_tensor().set_names({name})
    tokens = ov.PartialShape([-1, -1])
    ir.reshape(
        {"input_ids": tokens, "attention_mask": tokens}
        | {name: ov.PartialShape([-1, *shape]) for name, shape in zip(past, shapes.values(), strict=True)}
    )
    _make_stateful(ir, dict(zip(past, present, strict=True)))
    return ir


def _make_stateful(ir: ov.Model, states: dict[str, str]) -> None:
    """Turns inputs and outputs into variables. They begin as zeros; ``beam_idx`` ``[sequences]`` selects their rows."""
    from openvino._offline_transformations import apply_make_stateful_transformation

    apply_make_stateful_transformation(ir, states)
    beams = opset.parameter([-1], np.int32, name="beam_idx")
    beams.output(0).get_tensor().set_names({"beam_idx"})
    ir.add_parameters([beams])
    batch = opset.gather(opset.shape_of(ir.input("input_ids"), output_type="i64"), _ints([0]), _ints(0))
    for node in ir.get_ops():
        if node.get_type_name() != "ReadValue":
            continue
        readers = list(node.output(0).get_target_inputs())
        followed = opset.gather(node, beams, _ints(0)).output(0)
        for reader in readers:
            reader.replace_source_output(followed)
        dims = [dimension.get_length() for dimension in list(node.get_output_partial_shape(0))[1:]]
        zeros = opset.broadcast(opset.constant(np.float32(0)), opset.concat([batch, _ints(dims)], axis=0))
        node.set_arguments([zeros])
    ir.validate_nodes_and_infer_types()


def _conv_shape(mixer: Any) -> tuple[int, ...]:
    return mixer.conv1d.in_channels, mixer.conv_kernel_size


def _ssm_shape(mixer: Any) -> tuple[int, ...]:
    if hasattr(mixer, "x_proj"):
        return mixer.intermediate_size, mixer.ssm_state_size
    return mixer.num_heads, mixer.ssm_state_size, mixer.head_dim


def _decoder(model: Any) -> torch.nn.Module:
    import torch

    class Decoder(torch.nn.Module):
        """The model as a function: it takes the states as arguments and returns the new ones."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Tensor, attention_mask: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
            blocks = self.model.backbone.layers
            convs, ssms = list(states[: len(blocks)]), list(states[len(blocks) :])
            hidden = self.model.backbone.embeddings(input_ids)
            mask = attention_mask[:, -input_ids.shape[1] :].to(torch.float32)
            new_convs: list[Any] = []
            new_ssms: list[Any] = []
            for block, conv in zip(blocks, convs, strict=True):
                selective = hasattr(block.mixer, "A_log")
                ssm = ssms[len(new_ssms)] if selective else None
                mixed, conv, ssm = _mix(block.mixer, block.norm(hidden), mask, conv, ssm)
                new_convs.append(conv)
                new_ssms += [ssm] if selective else []
                hidden = hidden + mixed
            logits = self.model.lm_head(self.model.backbone.norm_f(hidden)).to(torch.float32)
            return (logits, *new_convs, *new_ssms)

    return Decoder().eval()


def _mix(mixer: Any, hidden: Tensor, mask: Tensor, conv: Tensor, ssm: Tensor | None) -> tuple[Any, ...]:
    """:return: The output of one mixer, ``[sequences, tokens, hidden]``, and its two new states."""
    from torch import cat
    from torch.nn import functional as F

    width, channels = mixer.intermediate_size, mixer.conv1d.in_channels
    gated_norm = getattr(mixer, "norm", None) is not None  # Mamba-2
    mask = mask.unsqueeze(-1)
    dt = None
    if gated_norm:
        projected = mixer.in_proj(hidden * mask)
        gate, x, dt = projected.split([width, channels, projected.shape[-1] - width - channels], dim=-1)
    else:
        x, gate = mixer.in_proj(hidden).split(width, dim=-1)
        x = x * mask
    # OpenVINO 2026.4 refuses to compile ("Invalid graph status") where a variable is concatenated as it is.
    joined = cat([conv.transpose(1, 2), x], dim=1).transpose(1, 2)
    conv = joined[..., -mixer.conv_kernel_size :]
    bias = None if mixer.conv1d.bias is None else mixer.conv1d.bias.float()
    x = F.conv1d(joined[..., 1:], mixer.conv1d.weight.float(), bias, groups=channels)
    x = mixer.act(x).transpose(1, 2) * mask
    if ssm is None:
        y = x
    elif gated_norm:
        y, ssm = _mamba2_scan(mixer, x, dt, ssm)
    else:
        y, ssm = _mamba_scan(mixer, x, ssm)
    y = mixer.norm(y, gate) if gated_norm else y * mixer.act(gate)
    return mixer.out_proj(y), conv, ssm


def _mamba_scan(mixer: Any, x: Tensor, ssm: Tensor) -> tuple[Tensor, Tensor]:
    from torch import ops
    from torch.nn import functional as F

    rank, states = mixer.time_step_rank, mixer.ssm_state_size
    parts = list(mixer.x_proj(x).split([rank, states, states], dim=-1))
    if hasattr(mixer, "rms_eps"):  # Falcon Mamba
        parts = [part * (part.pow(2).mean(-1, keepdim=True) + mixer.rms_eps).rsqrt() for part in parts]
    dt, b, c = parts
    dt = F.softplus(mixer.dt_proj(dt))
    y, ssm = ops.ov_ext.mamba_scan(x, dt, -mixer.A_log.float().exp(), b, c, ssm)
    return y + x * mixer.D.float(), ssm


def _mamba2_scan(mixer: Any, x: Tensor, dt: Any, ssm: Tensor) -> tuple[Tensor, Tensor]:
    from torch import ops
    from torch.nn import functional as F

    heads, groups, states = mixer.num_heads, mixer.n_groups, mixer.ssm_state_size
    rows = (x.shape[0], x.shape[1])
    x, b, c = x.split([mixer.intermediate_size, groups * states, groups * states], dim=-1)
    x = x.reshape(*rows, heads, mixer.head_dim)
    b, c = (each.reshape(*rows, groups, states) for each in (b, c))
    low, high = mixer.time_step_limit
    dt = F.softplus(dt + mixer.dt_bias.float()).clamp(low, None if high == float("inf") else high)
    y, ssm = ops.ov_ext.mamba2_scan(x * dt.unsqueeze(-1), -dt * mixer.A_log.float().exp(), b, c, ssm)
    y = y + x * mixer.D.float().unsqueeze(-1)
    return y.reshape(*rows, mixer.intermediate_size), ssm


@cache
def _operations() -> None:
    """Registers the scans as torch operations. They return zeros: tracing needs the right shapes only."""
    import torch

    def mamba_scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, ssm: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(x), torch.zeros_like(ssm)

    def mamba2_scan(x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, ssm: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(x), torch.zeros_like(ssm)

    for function in (mamba_scan, mamba2_scan):
        function.__annotations__ = {
            name: tuple[torch.Tensor, torch.Tensor] if name == "return" else torch.Tensor
            for name in function.__annotations__
        }
        torch.library.custom_op(f"ov_ext::{function.__name__}", function, mutates_args=())


def _build_mamba_scan(context: Any) -> list[Any]:
    """A loop over tokens: ``state = exp(dt * a) * state + dt * b * x; y = state @ c``."""
    x, dt, a, b, c, state = (context.get_input(index) for index in range(6))
    one: list[Node] = [opset.parameter([-1, 1, -1], np.float32) for _ in range(4)]  # x, dt, b, c of one token
    rate, before = opset.parameter([-1, -1], np.float32), opset.parameter([-1, -1, -1], np.float32)
    column, row = _ints([0, -1, 1]), _ints([0, 1, -1])
    x_now, dt_now = (opset.reshape(each, column, True) for each in one[:2])  # [sequences, channels, 1]
    b_now, c_now = (opset.reshape(each, row, True) for each in one[2:])  # [sequences, 1, states]
    kept = opset.multiply(opset.exp(opset.multiply(dt_now, rate)), before)
    after = opset.add(kept, opset.multiply(opset.multiply(dt_now, x_now), b_now))
    y = opset.matmul(after, c_now, False, True)  # [sequences, channels, 1]
    y = opset.reshape(y, row, True)
    body = ov.Model([opset.result(after), opset.result(y)], [*one, rate, before], "token")
    loop = opset.tensor_iterator()
    loop.set_body(body)
    for parameter, whole in zip(one, (x, dt, b, c), strict=True):
        loop.set_sliced_input(parameter, whole, 0, 1, 1, -1, 1)
    loop.set_invariant_input(rate, a)
    loop.set_merged_input(before, state, body.results[0].output(0))
    ys = loop.get_concatenated_slices(body.results[1].output(0), 0, 1, 1, -1, 1)
    return [ys, loop.get_iter_value(body.results[0].output(0), -1)]


def _build_mamba2_scan(context: Any) -> list[Any]:
    """Chunks of tokens by matrix products: Dao and Gu, "Transformers are SSMs" (arXiv 2405.21060), section 6."""
    x, log_decay, b, c, state = (context.get_input(index) for index in range(5))
    groups, states = (dimension.get_length() for dimension in list(b.get_partial_shape())[2:])
    heads, channels = (dimension.get_length() for dimension in list(x.get_partial_shape())[2:])
    share = heads // groups
    tokens = opset.gather(opset.shape_of(x, output_type="i64"), _ints(1), _ints(0))
    length = opset.minimum(tokens, _ints(CHUNK))
    padding = opset.floor_mod(opset.negative(tokens), length)

    def chunks(value: Any, rest: tuple[int, ...]) -> Any:
        """[sequences, tokens, ...] to [sequences, groups, share, chunks, length, ...]; share is 1 for b and c."""
        rank = len(list(value.get_partial_shape()))
        ends = opset.concat([_ints([0]), opset.unsqueeze(padding, _ints(0)), _ints([0] * (rank - 2))], axis=0)
        padded = opset.pad(value, _ints([0] * rank), ends, "constant", opset.constant(np.float32(0)))
        shape = opset.concat([_ints([0, -1]), opset.unsqueeze(length, _ints(0)), _ints(rest)], axis=0)
        split = opset.reshape(padded, shape, True)
        order = [0, 3, 4, 1, 2, *range(5, 3 + len(rest))]
        return opset.transpose(split, _ints(order))

    def tokens_of(value: Any) -> Any:
        """Makes one axis of tokens again of the axes of chunks and of tokens in a chunk."""
        return opset.reshape(value, _ints([0, 0, 0, -1, value.get_output_partial_shape(0)[5].get_length()]), True)

    x = chunks(x, (groups, share, channels))
    until = opset.cum_sum(chunks(log_decay, (groups, share)), _ints(4))  # [sequences, groups, share, chunks, length]
    b, c = (chunks(each, (groups, 1, states)) for each in (b, c))
    last = opset.gather(until, _ints(-1), _ints(4))  # [sequences, groups, share, chunks]
    whole = opset.cum_sum(last, _ints(3))
    before = opset.subtract(whole, last)
    since_start = opset.add(until, opset.unsqueeze(before, _ints(-1)))
    total = opset.gather(whole, _ints([-1]), _ints(3))  # [sequences, groups, share, 1]

    # What tokens give to later ones of the same chunk: y[i] = sum over j <= i of (c[i] . b[j]) decay(j, i) x[j].
    y = opset.matmul(opset.multiply(opset.matmul(c, b, False, True), _between(until, until)), x, False, False)
    # What tokens give to those of later chunks. With one chunk, as for a single token, these tensors are empty.
    left = opset.exp(opset.subtract(opset.unsqueeze(last, _ints(-1)), until))
    read, write = (
        opset.multiply(each, opset.unsqueeze(much, _ints(-1))) for each, much in ((c, opset.exp(until)), (b, left))
    )
    written = opset.matmul(_cut(write, 0, -1), _cut(x, 0, -1), True, False)
    flat = opset.reshape(written, _ints([0, 0, 0, 0, states * channels]), True)
    carried = opset.matmul(_between(_cut(before, 1, _END), _cut(whole, 0, -1)), flat, False, False)
    carried = opset.reshape(carried, _ints([0, 0, 0, 0, states, channels]), True)
    later = opset.add(_cut(y, 1, _END), opset.matmul(_cut(read, 1, _END), carried, False, False))
    y = tokens_of(opset.concat([_cut(y, 0, 1), later], axis=3))
    # What the state before the first token gives to all tokens, and the state after the last token.
    state = opset.reshape(state, _ints([0, groups, share, states, channels]), True)
    read = tokens_of(opset.multiply(c, opset.unsqueeze(opset.exp(since_start), _ints(-1))))
    y = opset.add(y, opset.matmul(read, state, False, False))
    left = opset.exp(opset.subtract(opset.unsqueeze(total, _ints(-1)), since_start))
    write = tokens_of(opset.multiply(b, opset.unsqueeze(left, _ints(-1))))
    kept = opset.multiply(state, opset.unsqueeze(opset.exp(total), _ints(-1)))
    state = opset.add(kept, opset.matmul(write, tokens_of(x), True, False))
    state = opset.reshape(state, _ints([0, heads, states, channels]), True)

    y = opset.reshape(opset.transpose(y, _ints([0, 3, 1, 2, 4])), _ints([0, 0, heads, channels]), True)
    y = opset.slice(y, _ints([0]), opset.unsqueeze(tokens, _ints(0)), _ints([1]), _ints([1]))
    return [y.output(0), state.output(0)]


def _cut(value: Any, start: int, stop: int) -> Any:
    """The chunks from ``start`` to ``stop``, as in a Python slice."""
    return opset.slice(value, _ints([start]), _ints([stop]), _ints([1]), _ints([3]))


def _between(ends: Any, starts: Any) -> Node:
    """exp(ends[i] - starts[j]) where j <= i, else 0: the part of what was added at j that is left at i."""
    difference = opset.subtract(opset.unsqueeze(ends, _ints(-1)), opset.unsqueeze(starts, _ints(-2)))
    count = opset.gather(opset.shape_of(ends, output_type="i64"), _ints(-1), _ints(0))
    places = opset.range(_ints(0), count, _ints(1), output_type="i64")
    later = opset.greater(opset.unsqueeze(places, _ints(0)), opset.unsqueeze(places, _ints(1)))
    return opset.exp(opset.select(later, opset.constant(np.float32(-np.inf)), difference))


def _ints(value: Any) -> Node:
    return opset.constant(np.array(value, dtype=np.int64))


_RULES = {"mamba_scan": _build_mamba_scan, "mamba2_scan": _build_mamba2_scan}
