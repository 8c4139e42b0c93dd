"""Small models of plain torch that no library of models knows: a torch encoder, a UNet, a mixer, a recurrent net, a
diffusion transformer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Encoder(nn.Module):
    """torch's own encoder: attention whose output projection is read by a function."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


class ResBlock(nn.Module):
    """Convolutions around a step embedding."""

    def __init__(self, d_in: int, d_out: int, d_step: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, d_in)
        self.conv1 = nn.Conv2d(d_in, d_out, 3, padding=1)
        self.step = nn.Linear(d_step, d_out)
        self.conv2 = nn.Conv2d(d_out, d_out, 3, padding=1)
        self.short = nn.Conv2d(d_in, d_out, 1)

    def forward(self, x: Tensor, step: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm(x))) + self.step(step)[:, :, None, None]
        return self.short(x) + self.conv2(F.silu(h))


class Attention2d(nn.Module):
    """Attention over pixels."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, d)
        self.to_out = nn.ModuleList([nn.Linear(d, d), nn.Dropout(0.0)])

    def forward(self, x: Tensor) -> Tensor:
        v = x.flatten(2).mT
        y = F.scaled_dot_product_attention(self.to_q(v), self.to_k(v), self.to_v(v))
        return x + self.to_out[0](y).mT.unflatten(2, x.shape[2:])


class Down(nn.Module):
    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResBlock(d_in, d_out, 12)])
        self.attentions = nn.ModuleList([Attention2d(d_out)])

    def forward(self, x: Tensor, step: Tensor) -> Tensor:
        return self.attentions[0](self.resnets[0](x, step))


class UNet(nn.Module):
    """Two levels down, a middle, two levels up, as in diffusion models."""

    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Parameter(torch.randn(1, 12))
        self.conv_in = nn.Conv2d(3, 8, 3, padding=1)
        self.down_blocks = nn.ModuleList([Down(8, 8), Down(8, 16)])
        self.mid_block = Down(16, 16)
        self.up_blocks = nn.ModuleList([Down(32, 8), Down(16, 8)])
        self.conv_out = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        step, kept = self.step.expand(len(x), -1), []
        h = self.conv_in(x)
        for block in self.down_blocks:
            h = block(h, step)
            kept.append(h)
            h = F.avg_pool2d(h, 2)
        h = self.mid_block(h, step)
        for block in self.up_blocks:
            h = block(torch.cat([F.interpolate(h, scale_factor=2), kept.pop()], 1), step)
        return self.conv_out(h)


class MixerBlock(nn.Module):
    def __init__(self, tokens: int, d: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.tokens = nn.Sequential(nn.Linear(tokens, 24), nn.GELU(), nn.Linear(24, tokens))
        self.channels = nn.Sequential(nn.Linear(d, 40), nn.GELU(), nn.Linear(40, d))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).mT).mT
        return x + self.channels(self.norm2(x))


class Mixer(nn.Module):
    """MLP-Mixer: one stack mixes tokens, which are the last dimension then."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 20, 8, 8)
        self.blocks = nn.Sequential(MixerBlock(16, 20), MixerBlock(16, 20))
        self.head = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.patches(x).flatten(2).mT).mean(1))


class Recurrent(nn.Module):
    """Embedding, LSTM, two linear layers: no stack of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 16)
        self.lstm = nn.LSTM(16, 20, batch_first=True)
        self.mid = nn.Linear(20, 24)
        self.out = nn.Linear(24, 64)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.out(F.gelu(self.mid(self.lstm(self.embed(input_ids))[0])))


class DiTBlock(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(d, elementwise_affine=False), nn.LayerNorm(d, elementwise_affine=False)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(d, 6 * d))
        self.qkv, self.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.fc1, self.fc2 = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        s1, b1, g1, s2, b2, g2 = self.modulation(c)[:, None].chunk(6, -1)
        q, k, v = self.qkv(self.norm1(x) * (1 + s1) + b1).chunk(3, -1)
        x = x + g1 * self.proj(F.scaled_dot_product_attention(q, k, v))
        return x + g2 * self.fc2(F.gelu(self.fc1(self.norm2(x) * (1 + s2) + b2)))


class DiffusionTransformer(nn.Module):
    """Patches, modulated blocks, a time step."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(4, 24, 2, 2)
        self.time = nn.Linear(1, 24)
        self.blocks = nn.ModuleList([DiTBlock(24), DiTBlock(24)])
        self.final = nn.Linear(24, 16)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h, c = self.patches(x).flatten(2).mT, self.time(t[:, None])
        for block in self.blocks:
            h = block(h, c)
        return self.final(h)
