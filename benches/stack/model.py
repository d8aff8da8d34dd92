"""The decoder: the shape of the paper's 30B model, random weights, everything but the index and attention operators."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

import glue

PAGE = 64
ROOM = 64  # Tokens that a request may grow by.


@dataclass(frozen=True)
class Dims:
    """GLM-4.7-Flash with a lightning indexer."""

    layers: int = 47
    hidden: int = 2048
    heads: int = 20
    q_rank: int = 768
    kv_rank: int = 512
    rope: int = 64
    nope: int = 192
    v: int = 256
    dense: int = 10240
    experts: int = 64
    active: int = 4
    expert: int = 1536
    vocabulary: int = 154880
    index_heads: int = 32
    index_dim: int = 128
    topk: int = 2048
    theta: float = 1e6

    @property
    def latent(self):
        """Rows of the fused first projection on a Shared layer."""
        return self.q_rank + self.kv_rank + self.rope

    @property
    def scale(self):
        return (self.nope + self.rope) ** -0.5


TINY = Dims(hidden=256, heads=4, q_rank=64, dense=512, experts=8, active=2, expert=128, vocabulary=512, layers=5,
            index_heads=8, topk=64)  # fmt: skip


def weights(dims, device):
    """Each matrix normal with variance 1 / inputs, so that what goes through keeps its size."""

    def matrix(*shape, scale=1.0):
        dtype = torch.bfloat16
        return torch.empty(*shape, dtype=dtype, device=device).normal_(0, scale * shape[-1] ** -0.5)

    def ones(n):
        return torch.ones(n, dtype=torch.bfloat16, device=device)

    def layer(dense):
        p = {
            "norm": ones(dims.hidden),
            "post_norm": ones(dims.hidden),
            "q_norm": ones(dims.q_rank),
            "kv_norm": ones(dims.kv_rank),
            "ik_norm": ones(dims.index_dim),
            "ik_bias": torch.zeros(dims.index_dim, dtype=torch.bfloat16, device=device),
            # Fused as servers do: q latent | KV latent | rope key | indexer key | indexer head weights.
            "a": matrix(dims.latent + dims.index_dim + dims.index_heads, dims.hidden),
            # Heads' queries | indexer's queries.
            "b": matrix(dims.heads * (dims.nope + dims.rope) + dims.index_heads * dims.index_dim, dims.q_rank),
            "absorb": matrix(dims.heads, dims.nope, dims.kv_rank, scale=(dims.kv_rank / dims.nope) ** 0.5),
            "values": matrix(dims.heads, dims.kv_rank, dims.v, scale=(dims.v / dims.kv_rank) ** 0.5),
            "o": matrix(dims.hidden, dims.heads * dims.v),
        }
        if dense:
            return p | {"w13": matrix(2 * dims.dense, dims.hidden), "w2": matrix(dims.hidden, dims.dense)}
        return p | {
            "router": matrix(dims.experts, dims.hidden),
            # The shared expert is the last.
            "w13": matrix(dims.experts + 1, 2 * dims.expert, dims.hidden),
            "w2": matrix(dims.experts + 1, dims.hidden, dims.expert),
        }

    return {
        "embed": torch.empty(dims.vocabulary, dims.hidden, dtype=torch.bfloat16, device=device).normal_(),
        "layers": [layer(dense=i == 0) for i in range(dims.layers)],
        "norm": ones(dims.hidden),
        "head": matrix(dims.vocabulary, dims.hidden),
    }


class Pool:
    """KV and index K of all layers in pages of 64 tokens, handed out in random order."""

    def __init__(self, dims, tokens, device):
        self.pages = -(-tokens // PAGE)
        new = dict(dtype=torch.uint8, device=device)
        self.kv = [torch.zeros(self.pages, PAGE, 656, **new) for _ in range(dims.layers)]
        self.index_k = [torch.zeros(self.pages, PAGE * (dims.index_dim + 4), **new) for _ in range(dims.layers)]
        self.order = torch.randperm(self.pages, device=device, dtype=torch.int32)

    @staticmethod
    def token_bytes(dims):
        return dims.layers * (656 + dims.index_dim + 4)

    def tables(self, requests, tokens):
        each = -(-tokens // PAGE)
        if requests * each > self.pages:
            raise ValueError(f"{requests} requests of {tokens} tokens do not fit in {self.pages} pages")
        return self.order[: requests * each].view(requests, each)

    def copy_first(self, table):
        """Every request gets the bytes of the first."""
        for store in (*self.kv, *self.index_k):
            for other in table[1:]:
                store[other.long()] = store[table[0].long()]


@dataclass
class Batch:
    """One forward pass: `rows` rows, one request's chunk (prefill) or one row of each request (decode)."""

    decode: bool
    table: torch.Tensor  # int32 [requests, pages]
    tokens: torch.Tensor  # int32 [requests, pages * 64]: the same by token, as some public kernels want it
    end: torch.Tensor  # int32 [rows]: tokens that a row sees
    longest: int  # The largest `end`; a host's own number, not the device's.
    slots: torch.Tensor = None  # int32 [rows]: where the rows' keys go
    table_row: torch.Tensor = None  # f32 [rows, rope]: RoPE of the rows' positions

    def place(self, rope):
        """From `end`: slots and RoPE rows."""
        position = self.end - 1
        if self.decode:
            self.slots = self.tokens.gather(1, position.long().unsqueeze(1)).view(-1)
        else:
            self.slots = self.tokens[0][position.long()]
        self.table_row = rope[position.long()]


class Model:
    def __init__(self, dims, device, longest):
        self.dims, self.device = dims, device
        self.k = glue.kernels(device)
        self.w = weights(dims, device)
        self.depth = dims.layers  # Layers that `forward` runs: fewer to compare arms before rounding has spread.
        f = torch.arange(dims.rope // 2, device=device, dtype=torch.float64) / (dims.rope // 2)
        angle = torch.arange(longest, device=device, dtype=torch.float64)[:, None] * dims.theta**-f
        self.rope = torch.cat([angle.cos(), angle.sin()], -1).float()

    def forward(self, tokens, batch, arm, pool, mark=lambda stage: None):
        """int64 `tokens` [rows] to hidden states after the last layer, not yet normalised."""
        dims, k = self.dims, self.k
        batch.place(self.rope)
        x, delta = self.w["embed"][tokens], None
        arm.begin(batch)
        mark("head")
        for layer, p in enumerate(self.w["layers"][: self.depth]):
            full = arm.full[layer]
            projections = "projections, Full" if full else "projections, Shared"
            y = k.add_norm(x, delta, p["norm"])
            a = F.linear(y, p["a"] if full else p["a"][: dims.latent])
            q_latent, row, ik, iw = k.latents(a, dims, p, batch.table_row)
            b = F.linear(q_latent, p["b"] if full else p["b"][: dims.heads * (dims.nope + dims.rope)])
            q = arm.queries(len(x))
            k.rope_q(b, dims, batch.table_row, q)
            heads = b[:, : dims.heads * (dims.nope + dims.rope)].view(len(x), dims.heads, -1)
            nope, latent = heads[..., : dims.nope].transpose(0, 1), q[:, : dims.heads, : dims.kv_rank].transpose(0, 1)
            torch.bmm(nope, p["absorb"], out=latent)
            arm.write_kv(row, batch, pool.kv[layer])
            mark(projections)
            if full:
                iq = b[:, dims.heads * (dims.nope + dims.rope) :].view(len(x), dims.index_heads, dims.index_dim)
                iq, iw = arm.write_index(iq, iw, ik, batch, pool.index_k[layer])
                mark("index writes")
                arm.select(layer, iq, iw, batch, pool.index_k[layer], mark)
            out = arm.attend(layer, q, batch, pool.kv[layer], mark)
            values = out.new_empty(len(x), dims.heads, dims.v)
            torch.bmm(out[:, : dims.heads].transpose(0, 1), p["values"], out=values.transpose(0, 1))
            y = F.linear(values.view(len(x), -1), p["o"])
            mark(projections)
            y = k.add_norm(x, y, p["post_norm"])
            if "router" in p:
                delta = k.experts(y, p["router"], p, dims)
                mark("MoE")
            else:
                delta = F.linear(k.silu_mul(F.linear(y, p["w13"])), p["w2"])
                mark("dense MLP")
        return x, delta

    def next_token(self, x, delta, rows=slice(None)):
        y = self.k.add_norm(x[rows], delta[rows], self.w["norm"])
        return F.linear(y, self.w["head"]).argmax(-1)
