"""Small networks for small data: a convolutional network and an LSTM classifier."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SmallCNN(nn.Module):
    """Four 3x3 convolutions (two at full, two at half resolution) and one linear layer; for images >= 8x8.

    ``norm=False`` leaves BatchNorm out (then every image is treated alone, so the mean gradient over a batch
    does not depend on how the batch is spread over processes).
    """

    def __init__(self, classes: int, channels: int = 1, width: int = 32, norm: bool = True) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(channels, width, 1, norm)
        self.conv2, self.bn2 = _conv(width, width, 1, norm)
        self.conv3, self.bn3 = _conv(width, 2 * width, 2, norm)
        self.conv4, self.bn4 = _conv(2 * width, 2 * width, 1, norm)
        self.linear = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, channels, H, W) -> class scores (N, classes)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        x = F.relu(self.bn4(self.conv4(x)))
        return self.linear(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def _conv(channels_in: int, channels: int, stride: int, norm: bool) -> tuple[nn.Conv2d, nn.Module]:
    conv = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=not norm)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    return conv, nn.BatchNorm2d(channels) if norm else nn.Identity()


class LSTMClassifier(nn.Module):
    """LSTM over the rows of an image (one row = one time step), last state classified.

    The input-to-hidden and hidden-to-hidden maps of the four gates (order i, f, g, o) are two ``nn.Linear``
    so that they can be decomposed like any other layer. A sequence (N, T, features) is accepted as well.
    """

    def __init__(self, classes: int, features: int, hidden: int = 128) -> None:
        super().__init__()
        self.hidden = hidden
        self.input_to_hidden = nn.Linear(features, 4 * hidden)
        self.hidden_to_hidden = nn.Linear(hidden, 4 * hidden, bias=False)
        self.linear = nn.Linear(hidden, classes)
        nn.init.orthogonal_(self.hidden_to_hidden.weight)
        with torch.no_grad():
            self.input_to_hidden.bias.zero_()
            self.input_to_hidden.bias[hidden : 2 * hidden] = 1.0  # forget gates start open

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, T, W) images or (N, T, features) sequences -> class scores (N, classes)."""
        if x.dim() == 4:
            x = x.transpose(1, 2).flatten(2)  # (N, T, C * W)
        gates_in = self.input_to_hidden(x)  # all time steps at once: (N, T, 4 hidden)
        h = gates_in.new_zeros(x.shape[0], self.hidden)
        c = gates_in.new_zeros(x.shape[0], self.hidden)
        for t in range(x.shape[1]):
            i, f, g, o = (gates_in[:, t] + self.hidden_to_hidden(h)).chunk(4, dim=1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        return self.linear(h)
