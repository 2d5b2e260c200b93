"""Every image classifier of transformers that a small configuration makes: what can be elastic in it."""

from typing import Any

import pytest
import torch
import transformers

from nncf_ext.structure.surgery import cut_tensors
from nncf_ext.structure.tracing.front import trace

H = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 3,
}
VISION: dict[str, tuple[str, dict[str, Any]]] = {
    "beit": ("Beit", {**H, "use_relative_position_bias": True, "use_mean_pooling": True}),
    "bit": ("Bit", {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [2, 2], "num_groups": 4, "num_labels": 3}),
    "clip": (
        "CLIP",
        {
            "vision_config": H,
            "text_config": {
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 16,
                "vocab_size": 20,
            },
            "projection_dim": 16,
        },
    ),
    "convnext": ("ConvNext", {"hidden_sizes": [8, 16], "depths": [2, 2], "num_stages": 2, "num_labels": 3}),
    "convnextv2": ("ConvNextV2", {"hidden_sizes": [8, 16], "depths": [2, 2], "num_stages": 2, "num_labels": 3}),
    "cvt": (
        "Cvt",
        {
            "embed_dim": [8, 16],
            "depth": [1, 2],
            "num_heads": [1, 2],
            "patch_sizes": [7, 3],
            "patch_stride": [4, 2],
            "patch_padding": [2, 1],
            "mlp_ratio": [2.0, 2.0],
            "attention_drop_rate": [0.0, 0.0],
            "drop_rate": [0.0, 0.0],
            "drop_path_rate": [0.0, 0.0],
            "qkv_bias": [True, True],
            "cls_token": [False, True],
            "qkv_projection_method": ["dw_bn"] * 2,
            "kernel_qkv": [3, 3],
            "padding_kv": [1, 1],
            "stride_kv": [2, 2],
            "padding_q": [1, 1],
            "stride_q": [1, 1],
            "num_labels": 3,
        },
    ),
    "data2vec-vision": ("Data2VecVision", {**H, "use_relative_position_bias": True}),
    "deit": ("DeiT", H),
    "dinov2": ("Dinov2", H),
    "dinov2_with_registers": ("Dinov2WithRegisters", H),
    "donut-swin": (
        "DonutSwin",
        {
            "embed_dim": 16,
            "depths": [2, 2],
            "num_heads": [2, 4],
            "image_size": 32,
            "patch_size": 2,
            "window_size": 4,
            "num_labels": 3,
        },
    ),
    "efficientnet": (
        "EfficientNet",
        {"width_coefficient": 0.25, "depth_coefficient": 0.3, "image_size": 32, "hidden_dim": 320, "num_labels": 3},
    ),
    "focalnet": (
        "FocalNet",
        {
            "embed_dim": 8,
            "depths": [2, 2],
            "hidden_sizes": [8, 16],
            "focal_levels": [2, 2],
            "focal_windows": [3, 3],
            "image_size": 32,
            "patch_size": 4,
            "num_labels": 3,
        },
    ),
    "hgnet_v2": (
        "HGNetV2",
        {
            "embedding_size": 16,
            "stem_channels": [3, 8, 16],
            "depths": [1, 1],
            "hidden_sizes": [16, 32],
            "stage_in_channels": [16, 16],
            "stage_mid_channels": [8, 8],
            "stage_out_channels": [16, 32],
            "stage_num_blocks": [1, 2],
            "stage_downsample": [False, True],
            "stage_light_block": [False, True],
            "stage_kernel_size": [3, 5],
            "stage_numb_of_layers": [2, 2],
            "num_labels": 3,
        },
    ),
    "hiera": (
        "Hiera",
        {
            "embed_dim": 8,
            "depths": [1, 2],
            "num_heads": [1, 2],
            "image_size": [32, 32],
            "patch_size": [7, 7],
            "patch_stride": [4, 4],
            "patch_padding": [3, 3],
            "embed_dim_multiplier": 2.0,
            "num_query_pool": 1,
            "query_stride": [2, 2],
            "masked_unit_size": [4, 4],
            "masked_unit_attention": [True, False],
            "num_labels": 3,
        },
    ),
    "ijepa": ("IJepa", H),
    "imagegpt": (
        "ImageGPT",
        {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 20, "n_positions": 16, "num_labels": 3},
    ),
    "levit": (
        "Levit",
        {
            "image_size": 64,
            "hidden_sizes": [16, 32, 32],
            "num_attention_heads": [2, 2, 2],
            "depths": [1, 2, 1],
            "key_dim": [8, 8, 8],
            "num_labels": 3,
        },
    ),
    "mobilenet_v1": ("MobileNetV1", {"depth_multiplier": 0.25, "image_size": 32, "num_labels": 3}),
    "mobilenet_v2": ("MobileNetV2", {"depth_multiplier": 0.25, "image_size": 32, "num_labels": 3}),
    "mobilevit": (
        "MobileViT",
        {
            "hidden_sizes": [16, 24, 32],
            "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 40],
            "num_attention_heads": 4,
            "image_size": 64,
            "num_labels": 3,
        },
    ),
    "mobilevitv2": (
        "MobileViTV2",
        {"image_size": 64, "width_multiplier": 0.25, "n_attn_blocks": [1, 1, 1], "num_labels": 3},
    ),
    "poolformer": (
        "PoolFormer",
        {
            "hidden_sizes": [8, 16],
            "depths": [1, 2],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "padding": [2, 1],
            "num_encoder_blocks": 2,
            "num_labels": 3,
        },
    ),
    "pp_lcnet": ("PPLCNet", {"scale": 0.25, "num_labels": 3}),
    "pvt": (
        "Pvt",
        {
            "image_size": 64,
            "hidden_sizes": [8, 16],
            "depths": [1, 2],
            "num_attention_heads": [1, 2],
            "num_encoder_blocks": 2,
            "sequence_reduction_ratios": [2, 1],
            "patch_sizes": [4, 2],
            "strides": [4, 2],
            "mlp_ratios": [2, 2],
            "num_labels": 3,
        },
    ),
    "pvt_v2": (
        "PvtV2",
        {
            "image_size": 64,
            "hidden_sizes": [8, 16],
            "depths": [1, 2],
            "num_attention_heads": [1, 2],
            "num_encoder_blocks": 2,
            "sr_ratios": [2, 1],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "mlp_ratios": [2, 2],
            "num_labels": 3,
        },
    ),
    "regnet": (
        "RegNet",
        {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [2, 2], "groups_width": 8, "num_labels": 3},
    ),
    "resnet": ("ResNet", {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [2, 2], "num_labels": 3}),
    "segformer": (
        "Segformer",
        {
            "hidden_sizes": [8, 16],
            "depths": [1, 2],
            "num_attention_heads": [1, 2],
            "num_encoder_blocks": 2,
            "sr_ratios": [2, 1],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "mlp_ratios": [2, 2],
            "num_labels": 3,
        },
    ),
    "siglip": (
        "Siglip",
        {
            "vision_config": H,
            "text_config": {
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 16,
                "vocab_size": 20,
            },
        },
    ),
    "swiftformer": ("SwiftFormer", {"depths": [1, 1, 2, 1], "embed_dims": [8, 8, 16, 16], "num_labels": 3}),
    "swin": (
        "Swin",
        {
            "embed_dim": 16,
            "depths": [2, 2],
            "num_heads": [2, 4],
            "image_size": 32,
            "patch_size": 2,
            "window_size": 4,
            "num_labels": 3,
        },
    ),
    "swinv2": (
        "Swinv2",
        {
            "embed_dim": 16,
            "depths": [2, 2],
            "num_heads": [2, 4],
            "image_size": 32,
            "patch_size": 2,
            "window_size": 4,
            "num_labels": 3,
        },
    ),
    "textnet": ("TextNet", {"num_labels": 3}),
    "vit": ("ViT", H),
    "vit_msn": ("ViTMSN", H),
    "perceiver": (
        "Perceiver",
        {
            "num_latents": 4,
            "d_latents": 16,
            "d_model": 16,
            "num_blocks": 1,
            "num_self_attends_per_block": 2,
            "num_self_attention_heads": 2,
            "num_cross_attention_heads": 2,
            "image_size": 16,
            "num_labels": 3,
        },
    ),
}

ELASTIC = {
    "beit": (5, 0, 1),
    "bit": (11, 2, 1),
    "clip": (5, 2, 1),
    "convnext": (6, 4, 1),
    "convnextv2": (6, 4, 1),
    "cvt": (5, 3, 7),
    "data2vec-vision": (5, 0, 1),
    "deit": (5, 2, 1),
    "dinov2": (5, 2, 1),
    "dinov2_with_registers": (5, 2, 1),
    "donut-swin": (10, 4, 1),
    "efficientnet": (24, 8, 1),
    "focalnet": (4, 4, 15),
    "hgnet_v2": (16, 3, 1),
    "hiera": (4, 3, 5),
    "ijepa": (5, 2, 1),
    "imagegpt": (3, 2, 3),
    "levit": (12, 10, 13),
    "mobilenet_v1": (14, 0, 1),
    "mobilenet_v2": (25, 10, 1),
    "mobilevit": (43, 12, 1),
    "mobilevitv2": (17, 5, 13),
    "poolformer": (5, 3, 1),
    "pp_lcnet": (17, 10, 1),
    "pvt": (6, 3, 5),
    "pvt_v2": (3, 3, 10),
    "regnet": (11, 4, 1),
    "resnet": (11, 2, 1),
    "segformer": (5, 3, 6),
    "siglip": (6, 3, 3),
    "swiftformer": (14, 5, 5),
    "swin": (10, 4, 1),
    "swinv2": (14, 4, 5),
    "textnet": (5, 11, 1),
    "vit": (5, 2, 1),
    "vit_msn": (5, 2, 1),
    "perceiver": (11, 4, 4),
}
"""Widths, chained blocks, and widths that are refused, by model."""


def make(name: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    kind, settings = VISION[name]
    config = getattr(transformers, f"{kind}Config")(**settings)
    ending = "ForImageClassificationLearned" if kind == "Perceiver" else "ForImageClassification"
    torch.manual_seed(0)
    model = getattr(transformers, kind + ending)(config).eval()
    size = settings.get("image_size", settings.get("vision_config", {}).get("image_size", 32))
    size = size[0] if isinstance(size, list) else size
    if name == "imagegpt":
        return model, {"input_ids": torch.arange(16)[None]}
    return model, {"pixel_values": torch.rand(1, 3, size, size)}


@pytest.mark.slow
@pytest.mark.parametrize("name", VISION)
def test_vision(name) -> None:
    model, inputs = make(name)
    traced = trace(model, inputs)
    blocks = sum(len(chain.blocks) for chain in traced.chains)
    assert (len(traced.dimensions), blocks, len(traced.refused)) == ELASTIC[name], traced.refused
    # All of it cut at once, to every second unit, runs and gives as many classes.
    before = outputs(model, inputs)
    numbers = sum(each.numel() for each in model.parameters())
    cut_tensors(model, {each: range(0, one.size, 2) for each, one in traced.dimensions.items()}, traced.dimensions)
    assert outputs(model, inputs).shape == before.shape
    most = 0.85 if name == "pvt_v2" else 0.8  # of its twelve groups three are elastic
    assert sum(each.numel() for each in model.parameters()) < most * numbers


def outputs(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    found = model(**inputs)
    return found.logits if "logits" in found else found[0]
