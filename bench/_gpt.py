"""The small GPT whose steps the benches time, and the block of all their GPTs."""
import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    "Causal attention and an MLP, each after a norm and added to what came in."
    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        b, t, w = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, w // self.heads).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, w))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    "The next token; nothing is initialised as a real one would be: it is for timing."
    def __init__(self, vocabulary=65, width=128, layers=4, heads=4, context=128):
        super().__init__()
        self.token, self.place = nn.Embedding(vocabulary, width), nn.Parameter(torch.zeros(context, width))
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(layers)], nn.LayerNorm(width), nn.Linear(width, vocabulary))

    def forward(self, tokens): return self.blocks(self.token(tokens) + self.place)


def flat_entropy(output, target): return F.cross_entropy(output.flatten(0, 1), target.flatten())
