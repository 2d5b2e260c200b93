"""Small networks of the kinds that super-networks are made of, written out: torchvision is not needed."""

from typing import Any

import torch
from torch import Tensor, nn


class Basic(nn.Module):
    """A residual block of two 3x3 convolutions."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride > 1 or inputs != width:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """A residual block of 1x1, 3x3 and 1x1 convolutions, the stride in the middle."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride > 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """The residual networks of He et al.; ResNet-50 is ``ResNet(Bottleneck, [3, 4, 6, 3])``."""

    def __init__(self, block: Any, depths: list[int], classes: int = 10, width: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        inputs, stages = width, []
        for stage, depth in enumerate(depths):
            own = width * 2**stage
            blocks = []
            for place in range(depth):
                blocks.append(block(inputs, own, 2 if stage and not place else 1))
                inputs = own * block.expansion
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = (*stages, *[nn.Identity()] * (4 - len(stages)))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class Squeeze(nn.Module):
    """Squeeze-and-excite."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.sigmoid(self.fc2(torch.relu(self.fc1(x.mean((2, 3), keepdim=True)))))
        return x * scale


class Inverted(nn.Module):
    """An inverted residual block: expand, depthwise, perhaps squeeze-and-excite, project."""

    def __init__(self, inputs: int, outputs: int, stride: int, ratio: int, squeeze: bool, kernel: int = 3) -> None:
        super().__init__()
        hidden = inputs * ratio
        layers: list[nn.Module] = []
        if ratio != 1:
            layers += [nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(inplace=True)]
        layers += [
            nn.Conv2d(hidden, hidden, kernel, stride, kernel // 2, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(inplace=True),
        ]
        layers += [Squeeze(hidden, max(2, hidden // 4))] if squeeze else []
        self.conv = nn.Sequential(*layers, nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


MOBILENET_V2 = [
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
]
"""Expansion, channels, number of blocks and stride of each stage, from table 2 of Sandler et al."""


class MobileNetV2(nn.Module):
    """MobileNetV2, or a smaller network of its kind."""

    def __init__(
        self, stages: Any = MOBILENET_V2, stem: int = 32, last: int = 1280, classes: int = 10, squeeze: bool = False
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.Sequential(nn.Conv2d(3, stem, 3, 2, 1, bias=False), nn.BatchNorm2d(stem), nn.ReLU6(inplace=True))
        ]
        inputs = stem
        for ratio, outputs, depth, stride in stages:
            for place in range(depth):
                layers.append(Inverted(inputs, outputs, 1 if place else stride, ratio, squeeze))
                inputs = outputs
        layers.append(nn.Sequential(nn.Conv2d(inputs, last, 1, bias=False), nn.BatchNorm2d(last), nn.ReLU6(True)))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(last, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


class Dense(nn.Module):
    """Densely connected layers: each reads all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8 + 6 * place) for place in range(3))
        self.layers = nn.ModuleList(nn.Conv2d(8 + 6 * place, 6, 3, padding=1) for place in range(3))
        self.transition = nn.Conv2d(26, 10, 1)
        self.fc = nn.Linear(10 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = torch.cat([x, layer(torch.relu(norm(x)))], 1)
        return self.fc(nn.functional.adaptive_avg_pool2d(self.transition(x), 2).flatten(1))


class DenseLayer(nn.Module):
    """Reads all before it through a bottleneck of four times the growth."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(4 * growth), nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, before: list[Tensor]) -> Tensor:
        hidden = self.conv1(torch.relu(self.norm1(torch.cat(before, 1))))
        return self.conv2(torch.relu(self.norm2(hidden)))


class DenseNet(nn.Module):
    """The densely connected networks of Huang et al. for images of 32 x 32; ``DenseNet([6, 12, 24, 16])`` is 121."""

    def __init__(self, depths: list[int], growth: int = 32, classes: int = 10) -> None:
        super().__init__()
        width = 2 * growth
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm0 = nn.BatchNorm2d(width)
        self.blocks, self.transitions = nn.ModuleList(), nn.ModuleList()
        for number, depth in enumerate(depths):
            self.blocks.append(nn.ModuleList(DenseLayer(width + place * growth, growth) for place in range(depth)))
            width += depth * growth
            if number + 1 < len(depths):
                reduce = nn.Conv2d(width, width // 2, 1, bias=False)
                self.transitions.append(nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), reduce, nn.AvgPool2d(2)))
                width //= 2
        self.norm, self.fc = nn.BatchNorm2d(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm0(self.stem(x)))
        for number, block in enumerate(self.blocks):
            found = [x]
            for layer in block:
                found.append(layer(found))
            x = torch.cat(found, 1)
            x = self.transitions[number](x) if number < len(self.transitions) else x
        return self.fc(torch.relu(self.norm(x)).mean((2, 3)))


def vgg_11(kernel: int = 3, classes: int = 10) -> nn.Sequential:
    """VGG-11 with batch norms for images of 32 x 32, from configuration A of Simonyan and Zisserman."""
    layers: list[nn.Module] = []
    inputs = 3
    for width, pool in ((64, 1), (128, 1), (256, 0), (256, 1), (512, 0), (512, 1), (512, 0), (512, 1)):
        layers += [nn.Conv2d(inputs, width, kernel, padding=kernel // 2), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        layers += [nn.MaxPool2d(2)] if pool else []
        inputs = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, classes))


class ConvNextBlock(nn.Module):
    """Depthwise 7x7, layer norm over channels, an MLP, layer scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)
        self.scale = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        hidden = self.scale * self.down(nn.functional.gelu(self.up(hidden)))
        return x + hidden.permute(0, 3, 1, 2)


class ConvNext(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.blocks = nn.Sequential(ConvNextBlock(8), ConvNextBlock(8))
        self.reduce = nn.Conv2d(8, 12, 2, 2)
        self.more = nn.Sequential(ConvNextBlock(12), ConvNextBlock(12))
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.more(self.reduce(self.blocks(self.stem(x))))
        return self.head(self.norm(x.mean((2, 3))))


class Attention(nn.Module):
    """One fused projection, a number of heads that is written down: what hand-written transformers do."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        scores = query @ key.transpose(-2, -1) / self.head_dim**0.5
        return self.proj((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))


class Vit(nn.Module):
    """A vision transformer with a class token."""

    def __init__(self, width: int = 24, heads: int = 4, depth: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, 8)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, 17, width))
        self.blocks = nn.ModuleList(VitBlock(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class VitBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width), nn.Sequential(nn.Linear(width, 40), nn.GELU(), nn.Linear(40, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Shuffle(nn.Module):
    """Convolutions in groups, group norm, a shuffle by hand, two halves, a gated unit."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 12, 3)
        self.grouped, self.norm = nn.Conv2d(12, 24, 3, groups=4), nn.GroupNorm(4, 24)
        self.one, self.two = nn.Conv2d(12, 8, 1), nn.Conv2d(12, 8, 1)
        self.gated, self.up = nn.Conv2d(8, 20, 1), nn.ConvTranspose2d(10, 6, 2, 2)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.grouped(self.first(x))))
        batch, channels, height, width = x.shape
        x = x.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(x.shape)
        left, right = x.chunk(2, 1)
        x = nn.functional.glu(self.gated(self.one(left) + self.two(right)), 1)
        return self.fc(self.up(x).mean((2, 3)))


SMALL = {
    "basic": lambda: ResNet(Basic, [2, 2], width=8),
    "bottleneck": lambda: ResNet(Bottleneck, [3, 2], width=4),
    "mobilenet_v2": lambda: MobileNetV2([(1, 8, 1, 1), (4, 10, 2, 2), (4, 12, 3, 2)], 8, 40),
    "squeeze": lambda: MobileNetV2([(1, 8, 1, 1), (4, 10, 3, 2)], 8, 40, squeeze=True),
    "dense": Dense,
    "convnext": ConvNext,
    "vit": Vit,
    "shuffle": Shuffle,
}
"""Makers of small networks that take images ``[batch, 3, 32, 32]``, by name."""


def network(name: str) -> nn.Module:
    """
    :param name: A key of :data:`SMALL`.
    :return: The network in evaluation mode, all of its numbers random, so that nothing cancels out by chance.
    """
    torch.manual_seed(7)
    model = SMALL[name]()
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and tensor.ndim == 1:
            tensor.data.uniform_(0.5, 1.5)
    return model.eval()
