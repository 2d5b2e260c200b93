"""PEFT's LoRA layer with a delta that keeps the zeros of its base, and one that keeps its grid as well."""

from typing import Any, Self

import nncf
import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from nncf_ext.algorithms.elastic_lora.adapter import active_rank
from nncf_ext.algorithms.sqft.delta import (
    MaskedLinear,
    QuantizedLinear,
    masked_delta,
    merged_codes,
    pack_mask,
    unpack_mask,
)


class MaskedLoraLinear(LoraLinear):
    """
    A LoRA layer whose delta is zero wherever the base weight is: ``D = s (B A) * M``.

    It takes the place of PEFT's layer around the same modules and parameters, so saving, loading, switching and
    disabling adapters are PEFT's. M is fixed when the layer is made, and kept with one bit a weight. An elastic rank
    (:mod:`nncf_ext.algorithms.elastic_lora`) counts.
    """

    mask: Tensor

    @classmethod
    def around(cls, layer: LoraLinear) -> Self:
        """
        :param layer: PEFT's layer; not to be used any more.
        :return: The layer that takes its place.
        """
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.__dict__.update(layer.__dict__)
        made._buffers = dict(layer._buffers)
        made._non_persistent_buffers_set = set(layer._non_persistent_buffers_set)
        base: Any = layer.get_base_layer()
        made.register_buffer("mask", pack_mask(base.weight.detach() != 0), persistent=False)
        return made

    def factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """
        :param adapter: Name of the adapter.
        :return: A ``[rank, in]`` and B ``[out, rank]`` of the active rank.
        """
        lora_A: Any = self.lora_A[adapter]
        lora_B: Any = self.lora_B[adapter]
        rank = active_rank(lora_A)
        return lora_A.weight[:rank], lora_B.weight[:, :rank]

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
        lora_A, lora_B = self.factors(adapter)
        delta = masked_delta(lora_A.float(), lora_B.float(), self.mask, self.scaling[adapter])
        return delta.to(lora_B.dtype)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """
        :param x: Inputs ``[.., in]``.
        :param args: For the base layer.
        :param kwargs: For the base layer.
        :return: ``[.., out]``.
        :raises nncf.ParameterNotSupportedError: A batch mixes adapters (``adapter_names``).
        """
        if kwargs.get("adapter_names") is not None:
            msg = "A batch that mixes adapters (adapter_names=...) is not possible with mergeable adapters."
            raise nncf.ParameterNotSupportedError(msg)
        adapters = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or not adapters:
            return super().forward(x, *args, **kwargs)
        return self._adapted(x, adapters)

    def _adapted(self, x: Tensor, adapters: list[str]) -> Tensor:
        base = self.get_base_layer()
        result = base(x)
        for adapter in adapters:
            lora_A, lora_B = self.factors(adapter)
            with _no_autocast(x):
                dropped = self.lora_dropout[adapter](x.to(lora_A.dtype))
                delta = MaskedLinear.apply(dropped, lora_A, lora_B, self.mask, self.scaling[adapter])
            result = result + delta.to(result.dtype)
        return result


class QuantizedLoraLinear(MaskedLoraLinear):
    """
    A masked LoRA layer that computes with the grid points nearest to its merged weight: what it will be after merging.
    """

    grid_scales: Tensor
    input_dropout: bool

    @classmethod
    def on_grid(cls, layer: LoraLinear, scales: Tensor, trained_with: str | None, input_dropout: bool) -> Self:
        """
        :param layer: PEFT's layer; not to be used any more.
        :param scales: Scales ``[out, groups]``, float16.
        :param trained_with: Adapter with which scales are trained, or None to freeze them. Trained ones are float32,
            used as float16, and belong to the adapter: PEFT saves and loads them with it.
        :param input_dropout: Whether dropout acts on all of the layer's input.
        :return: The layer that takes its place.
        """
        made = cls.around(layer)
        made.input_dropout = input_dropout
        made.register_buffer("grid_scales", scales, persistent=False)
        made.lora_scales = nn.ParameterDict({trained_with: nn.Parameter(scales.float())} if trained_with else {})
        return made

    def scales(self, adapter: str) -> Tensor:
        """
        :param adapter: Name of the adapter.
        :return: Scales ``[out, groups]``: those trained with the adapter, float32, or the frozen ones, float16.
        """
        trained: Any = self.lora_scales
        return trained[adapter] if adapter in trained else self.grid_scales

    def codes(self, adapter: str) -> Tensor:
        """
        :param adapter: Name of the adapter.
        :return: Codes ``[out, in]`` of the merged weight, int8: those of the forward.
        """
        lora_A, lora_B = self.factors(adapter)
        base: Any = self.get_base_layer()
        return merged_codes(base.weight, self.scales(adapter).half(), lora_A, lora_B, self.mask, self.scaling[adapter])

    def get_delta_weight(self, adapter: str) -> Tensor:
        """
        :param adapter: Name of the adapter.
        :raises nncf.ParameterNotSupportedError: Always: what PEFT adds would be rounded nowhere.
        """
        msg = "PEFT's merge would leave the INT4 grid. Use nncf_ext.merge(model, nncf_ext.MergeMode.QUANT_AWARE)."
        raise nncf.ParameterNotSupportedError(msg)

    def _adapted(self, x: Tensor, adapters: list[str]) -> Tensor:
        if len(adapters) > 1:
            msg = f"Adapters {adapters} are active; a weight is rounded with one. Use set_adapter(name)."
            raise nncf.ParameterNotSupportedError(msg)
        (adapter,) = adapters
        base, dropout, scaling = self.get_base_layer(), self.lora_dropout[adapter], self.scaling[adapter]
        lora_A, lora_B = self.factors(adapter)
        with _no_autocast(x):
            if self.input_dropout:
                x = dropout(x)
            result = QuantizedLinear.apply(x, lora_A, lora_B, self.scales(adapter), base.weight, self.mask, scaling)
            if self.training and not self.input_dropout and not isinstance(dropout, nn.Identity):
                # What the adapter makes of inputs that are dropped is taken away again.
                dropped = x.to(lora_A.dtype) - dropout(x.to(lora_A.dtype))
                taken = MaskedLinear.apply(dropped, lora_A, lora_B, self.mask, scaling)
                result = result - taken.to(result.dtype)
        return result if base.bias is None else result + base.bias


def _no_autocast(x: Tensor) -> torch.autocast:
    """Deltas and codes have one type, whatever autocast would choose."""
    return torch.autocast(x.device.type, enabled=False)
