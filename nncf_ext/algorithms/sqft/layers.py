"""PEFT's LoRA layer with a delta that keeps the zeros of its base, and one that keeps its grid as well."""

from typing import Any, Self

import nncf
import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from nncf_ext.algorithms.elastic_lora.inspection import active_factors
from nncf_ext.algorithms.sqft.delta import MergedLinear, MergedWeight, pack_mask, unpack_mask

_SCALES = "nncf_ext_scales"


def put_scales(linear: nn.Module, scales: Tensor | None) -> None:
    """
    Notes on a floating layer the grid on which its weight is to be stored. Not part of the state dict.

    :param linear: The layer.
    :param scales: Scales ``[out, groups]``, float16; None takes them off.
    """
    if scales is None:
        linear._buffers.pop(_SCALES, None)
        linear._non_persistent_buffers_set.discard(_SCALES)
    else:
        # As integers: Module.to(dtype) would round a floating buffer, and another scale gives other codes.
        linear.register_buffer(_SCALES, scales.half().view(torch.int16), persistent=False)


def scales_on(linear: nn.Module) -> Tensor | None:
    """
    :param linear: Any module.
    :return: What :func:`put_scales` noted, ``[out, groups]`` float16, or None.
    """
    stored = linear._buffers.get(_SCALES)
    return None if stored is None else stored.view(torch.float16)


class MaskedLoraLinear(LoraLinear):
    """
    A LoRA layer whose delta is zero wherever the base weight is: ``D = s (B A) * M``.

    It takes the place of PEFT's layer around the same modules and parameters, so saving, loading, switching and
    disabling adapters are PEFT's. M is fixed when the layer is made, and kept with one bit a weight. An elastic rank
    (:mod:`nncf_ext.algorithms.elastic_lora`) counts; it is read once in a forward.
    """

    mask: Tensor
    _drops_all_inputs = False

    @classmethod
    def around(cls, layer: LoraLinear) -> Self:
        """
        :param layer: PEFT's layer; not to be used any more.
        :return: The layer that takes its place.
        """
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.__dict__.update(layer.__dict__)
        base: Any = layer.get_base_layer()
        made.register_buffer("mask", pack_mask(base.weight.detach() != 0), persistent=False)
        return made

    def merged_weight(self, adapter: str) -> MergedWeight:
        """
        :param adapter: Name of the adapter.
        :return: The base with what is active of the adapter.
        """
        base: Any = self.get_base_layer()
        lora_A, lora_B = active_factors(self, adapter)
        return MergedWeight(base.weight, self.mask, lora_A, lora_B, self.scaling[adapter], self.scales_of(adapter))

    def scales_of(self, adapter: str) -> Tensor | None:
        """
        :param adapter: Name of the adapter.
        :return: Scales of its grid ``[out, groups]``; None: there is no grid.
        """
        return None

    def check_base(self) -> None:
        """
        :raises nncf.ValidationError: The base weight has other zeros than when the layer was made.
        """
        weight: Any = self.get_base_layer().weight
        if not torch.equal(weight != 0, unpack_mask(self.mask, weight.shape[1])):
            msg = "its base weight has other zeros than when it was made mergeable."
            raise nncf.ValidationError(msg)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """
        :param adapter: Name of the adapter.
        :return: ``s (B A) * M``, ``[out, in]``, in the type of B: what PEFT's own ``merge_adapter`` adds.
        """
        merged = self.merged_weight(adapter)
        return merged.deltas(merged.lora_B.dtype).detach()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """
        :param x: Inputs ``[.., in]``.
        :param args: For the base layer, where it is used alone.
        :param kwargs: The same.
        :return: ``[.., out]``: what the merged layer gives, but for dropout.
        :raises nncf.ParameterNotSupportedError: A batch mixes adapters (``adapter_names``), or several are active.
        """
        if kwargs.get("adapter_names") is not None:
            msg = "A batch that mixes adapters (adapter_names=...) is not possible with mergeable adapters."
            raise nncf.ParameterNotSupportedError(msg)
        adapters = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or not adapters:
            return super().forward(x, *args, **kwargs)
        if len(adapters) > 1:
            msg = f"Adapters {adapters} are active; a weight is merged with one. Use set_adapter(name)."
            raise nncf.ParameterNotSupportedError(msg)
        return self._adapted(x, adapters[0])

    def _adapted(self, x: Tensor, adapter: str) -> Tensor:
        merged = self.merged_weight(adapter)
        bias: Any = self.get_base_layer().bias
        dropout: Any = self.lora_dropout[adapter]
        probability = dropout.p if self.training and isinstance(dropout, nn.Dropout) else 0.0
        if self._drops_all_inputs:
            x, probability = dropout(x), 0.0
        device = x.device.type
        autocast = torch.is_autocast_enabled(device)
        x = x.to(torch.get_autocast_dtype(device) if autocast else merged.weight.dtype)
        # The types are chosen now; autocast would change those of the products inside.
        with torch.autocast(device, enabled=False):
            return MergedLinear.apply(
                x,
                merged.lora_A,
                merged.lora_B,
                merged.scales,
                merged.weight,
                merged.mask,
                None if bias is None else bias.to(x.dtype),
                merged.scaling,
                probability,
            )


class QuantizedLoraLinear(MaskedLoraLinear):
    """
    A masked LoRA layer that computes with the grid points nearest to its merged weight: what it will be after merging.

    The scales of the grid are noted on its base layer. Trained ones belong to the adapter: PEFT saves, loads and
    freezes them together with A and B.
    """

    adapter_layer_names = (*LoraLinear.adapter_layer_names, "lora_scales")
    lora_scales: nn.ParameterDict

    @classmethod
    def on_grid(cls, layer: LoraLinear, scales: Tensor, trained: str | None, drops_all_inputs: bool) -> Self:
        """
        :param layer: PEFT's layer; not to be used any more.
        :param scales: Scales ``[out, groups]``, float16.
        :param trained: Adapter with which scales are trained, or None; kept in float32 then, and used as float16.
        :param drops_all_inputs: Whether dropout acts on all of the layer's input.
        :return: The layer that takes its place.
        """
        made = cls.around(layer)
        base: Any = layer.get_base_layer()
        put_scales(base, scales)
        made._drops_all_inputs = drops_all_inputs
        made.lora_scales = nn.ParameterDict({} if trained is None else {trained: nn.Parameter(scales.float())})
        return made

    def scales_of(self, adapter: str) -> Tensor:
        """
        :param adapter: Name of the adapter.
        :return: Scales of its grid ``[out, groups]``: float16, or float32 if they are trained.
        """
        if adapter in self.lora_scales:
            return self.lora_scales[adapter]
        scales = scales_on(self.get_base_layer())
        assert scales is not None  # on_grid has put them there
        return scales

    def get_delta_weight(self, adapter: str) -> Tensor:
        """
        :param adapter: Name of the adapter.
        :raises nncf.ParameterNotSupportedError: Always: what PEFT adds would be rounded nowhere.
        """
        msg = "PEFT's merge would leave the INT4 grid. Use nncf_ext.merge(model, nncf_ext.MergeMode.QUANT_AWARE)."
        raise nncf.ParameterNotSupportedError(msg)
