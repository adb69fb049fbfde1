"""ConstNet in PyTorch, for `experiments.performance.benchmark` to measure zerojax against."""

import os
from typing import Any

import torch
from torch import nn

from experiments.performance.measuring import SECONDS, Row, rates, time_alone


class Block(nn.Module):
    """BatchNorm, ReLU, 3x3 convolution, and the shortcut around them."""

    def __init__(self, features: int, new: int, stride: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(features)
        self.conv = nn.Conv2d(features, new, 3, stride, padding=1, bias=False)
        self.shortcut = None
        if features != new:
            self.shortcut = nn.Conv2d(features, new, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.bn(x))
        return self.conv(y) + (x if self.shortcut is None else self.shortcut(y))


class ConstNet(nn.Module):
    """The same layers in the same order; which weights they have does not matter for time."""

    def __init__(self, depth: int, width: int, channels: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        blocks, features = [], 16
        for stage in range(3):
            for layer in range((depth - 4) // 3):
                new = 16 * width * 2**stage
                blocks.append(Block(features, new, 2 if stage > 0 and layer == 0 else 1))
                features = new
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(features, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.blocks(self.stem(x))).mean((2, 3)))


def measure(
    row: Row, repetitions: int, *, compiled: bool, deterministic: bool = False
) -> dict[str, Any]:
    """Images a second of training, by `torch.compile` or eager, with the fastest kernels or with
    deterministic ones."""
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    torch.backends.cudnn.benchmark = not deterministic
    torch.use_deterministic_algorithms(deterministic)
    if deterministic:  # read by cuBLAS when it is first called: in a process of its own
        os.environ['CUBLAS_WORKSPACE_CONFIG'] = ':4096:8'
    tf32 = row.precision == 'tf32'
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    model = ConstNet(row.depth, row.width, row.channels).to(device)
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.03, momentum=0.9, weight_decay=5e-4)
    images = torch.randn(row.batch_size, row.channels, row.size, row.size, device=device)
    images = images.to(memory_format=torch.channels_last)
    labels = torch.randint(10, (row.batch_size,), device=device)
    network: Any = model
    if compiled:
        network = torch.compile(model, mode='max-autotune' if device == 'cuda' else None)

    def train(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device, torch.bfloat16, enabled=row.precision == 'bfloat16'):
                loss = torch.nn.functional.cross_entropy(network(images), labels)
            loss.backward()
            optimizer.step()
        if device == 'cuda':
            torch.cuda.synchronize()

    return {'train': rates(row.batch_size, time_alone(train, repetitions, SECONDS))}
