"""A byte-level DeepSeek Sparse Attention transformer, small enough to train in minutes.

One forward serves training, evaluation and, with `quantised=True`, the arithmetic of a server that keeps
index K and index Q in fp8 and the KV row in bf16. README.md states the same equations without PyTorch.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

FP8_MAX = 448.0


def load_config(path=Path(__file__).with_name("config.json")):
    return json.loads(Path(path).read_text())


def fp8(x):
    """e4m3 values and the scale of each vector along the last dimension."""
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-4) / FP8_MAX
    return (x / scale).to(torch.float8_e4m3fn).float(), scale


def top_k_mask(scores, causal, k):
    """The k best causal positions of each row, ties to the lowest position; all of them where there are no more than k."""
    scores = scores.masked_fill(~causal, float("-inf"))
    kth = scores.topk(min(k, scores.shape[-1]), sorted=False).values.amin(-1, keepdim=True)
    above = scores > kth
    tied = (scores == kth) & causal
    room = k - above.sum(-1, keepdim=True)
    return above | (tied & (tied.cumsum(-1, dtype=torch.int32) <= room))


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        x = x.float()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


def rope_tables(cfg, length, device):
    dim = cfg["qk_rope_head_dim"]
    inverse = cfg["rope_theta"] ** (-torch.arange(0, dim, 2, device=device, dtype=torch.float64) / dim)
    angle = torch.arange(length, device=device, dtype=torch.float64)[:, None] * inverse
    return angle.cos().float(), angle.sin().float()


def rotate(x, rope):
    """Interleaved RoPE: pairs (x[2i], x[2i+1]) turn by the angle of frequency i. x is [..., length, heads, dim]."""
    cos, sin = (table[:, None, :] for table in rope)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


class Indexer(nn.Module):
    """The lightning indexer. Its inputs are detached: only the KL loss trains it."""

    def __init__(self, cfg):
        super().__init__()
        self.heads, self.dim, self.rope_dim = cfg["index_n_heads"], cfg["index_head_dim"], cfg["qk_rope_head_dim"]
        self.wq_b = nn.Linear(cfg["q_lora_rank"], self.heads * self.dim, bias=False)
        self.wk = nn.Linear(cfg["hidden_size"], self.dim, bias=False)
        self.k_norm = nn.LayerNorm(self.dim, eps=1e-6)
        self.weights_proj = nn.Linear(cfg["hidden_size"], self.heads, bias=False)

    def turn(self, x, rope):
        return torch.cat((rotate(x[..., : self.rope_dim], rope), x[..., self.rope_dim :].float()), -1)

    def qkw(self, x, q_latent, rope):
        """Queries [..., heads, dim], keys [..., dim] and head weights [..., heads]."""
        x, q_latent = x.detach(), q_latent.detach()
        q = self.turn(self.wq_b(q_latent).unflatten(-1, (self.heads, self.dim)), rope)
        k = self.turn(self.k_norm(self.wk(x).float()).unsqueeze(-2), rope).squeeze(-2)
        return q, k, self.weights_proj(x).float() * (self.dim * self.heads) ** -0.5

    def forward(self, x, q_latent, rope, quantised):
        """I[t, s] = sum_h w[t, h] * relu(q[t, h] . k[s]), before the causal mask."""
        q, k, w = self.qkw(x, q_latent, rope)
        if quantised:
            (q, q_scale), (k, k_scale) = fp8(q), fp8(k)
            w = w * q_scale.squeeze(-1)
        logits = F.relu(torch.einsum("bthd,bsd->bths", q, k))
        scores = (logits.float() * w.unsqueeze(-1)).sum(2)
        return scores * k_scale.transpose(1, 2) if quantised else scores


class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        hidden, self.heads, eps = cfg["hidden_size"], cfg["num_attention_heads"], cfg["rms_norm_eps"]
        self.nope, self.rope = cfg["qk_nope_head_dim"], cfg["qk_rope_head_dim"]
        self.value, self.latent = cfg["v_head_dim"], cfg["kv_lora_rank"]
        self.q_a_proj = nn.Linear(hidden, cfg["q_lora_rank"], bias=False)
        self.q_a_layernorm = RMSNorm(cfg["q_lora_rank"], eps)
        self.q_b_proj = nn.Linear(cfg["q_lora_rank"], self.heads * (self.nope + self.rope), bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, self.latent + self.rope, bias=False)
        self.kv_a_layernorm = RMSNorm(self.latent, eps)
        self.kv_b_proj = nn.Linear(self.latent, self.heads * (self.nope + self.value), bias=False)
        self.o_proj = nn.Linear(self.heads * self.value, hidden, bias=False)
        self.indexer = Indexer(cfg)

    def project(self, x, rope):
        """The query latent, queries [..., heads, nope + rope] and the KV row [..., latent + rope]."""
        q_latent = self.q_a_layernorm(self.q_a_proj(x))
        q = self.q_b_proj(q_latent).unflatten(-1, (self.heads, self.nope + self.rope))
        q = torch.cat((q[..., : self.nope].float(), rotate(q[..., self.nope :], rope)), -1)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split((self.latent, self.rope), -1)
        row = torch.cat((self.kv_a_layernorm(latent), rotate(k_rope.unsqueeze(-2), rope).squeeze(-2)), -1)
        return q_latent, q, row

    def qkv(self, x, rope, quantised):
        """The query latent, the KV row, and per-head q, k, v expanded from them; a server attends over the row itself."""
        q_latent, q, row = self.project(x, rope)
        if quantised:
            row = row.bfloat16().float()
        latent, k_rope = row.split((self.latent, self.rope), -1)
        k, v = self.kv_b_proj(latent).unflatten(-1, (self.heads, self.nope + self.value)).split((self.nope, self.value), -1)
        k = torch.cat((k.float(), k_rope.unsqueeze(-2).expand(-1, -1, self.heads, -1)), -1)
        return q_latent, row, *(t.to(v.dtype).transpose(1, 2) for t in (q, k, v))

    def up_projections(self):
        """`kv_b_proj` as [heads, nope, latent] and [heads, value, latent]: what the absorbed form multiplies by."""
        weight = self.kv_b_proj.weight.unflatten(0, (self.heads, -1))
        return weight.split((self.nope, self.value), 1)

    def absorbed(self, q):
        """Queries [..., heads, nope + rope] as what meets the KV row, [..., heads, latent + rope]."""
        q = q.float()
        return torch.cat((torch.einsum("...hn,hnc->...hc", q[..., : self.nope], self.up_projections()[0]), q[..., self.nope :]), -1)

    def mixed(self, latents):
        """The attention-weighted latents of each head, [..., heads, latent], as this layer's output."""
        return self.o_proj(torch.einsum("...hc,hvc->...hv", latents, self.up_projections()[1]).flatten(-2))

    def dense(self, q, k, v):
        # The fused kernels want one head size for q, k and v.
        out = F.scaled_dot_product_attention(q, k, F.pad(v, (0, q.shape[-1] - v.shape[-1])), is_causal=True)
        return self.output(out[..., : self.value])

    def probabilities(self, q, k, mask):
        scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
        return scores.masked_fill(~mask.unsqueeze(1), float("-inf")).softmax(-1)

    def output(self, out):
        return self.o_proj(out.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        hidden, inner = cfg["hidden_size"], cfg["intermediate_size"]
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.topk = cfg["index_topk"]
        self.input_layernorm = RMSNorm(cfg["hidden_size"], cfg["rms_norm_eps"])
        self.self_attn = Attention(cfg)
        self.post_attention_layernorm = RMSNorm(cfg["hidden_size"], cfg["rms_norm_eps"])
        self.mlp = MLP(cfg)

    def forward(self, h, rope, causal, role, mask, quantised, with_kl):
        """Returns the hidden states, the selection in force after this layer, and the indexer's KL loss.

        Roles: F selects, S keeps `mask`, R selects at random (a control), - attends densely.
        """
        attn, kl = self.self_attn, None
        x = self.input_layernorm(h)
        q_latent, _, q, k, v = attn.qkv(x, rope, quantised)
        if role == "-" and not with_kl:
            h = h + attn.dense(q, k, v)
        else:
            if role == "F" or with_kl:
                scores = attn.indexer(x, q_latent, rope, quantised)
            if role == "F":
                mask = top_k_mask(scores.detach(), causal, self.topk)
            elif role == "R":
                mask = top_k_mask(torch.rand(h.shape[0], *causal.shape, device=h.device), causal, self.topk)
            seen = causal.unsqueeze(0) if role == "-" else mask
            p = attn.probabilities(q, k, seen)
            if with_kl:
                kl = indexer_kl(p.detach().mean(1), scores, seen)
            h = h + attn.output(p.to(v.dtype) @ v)
        return h + self.mlp(self.post_attention_layernorm(h)), mask, kl


def indexer_kl(target, scores, seen):
    """KL(head-averaged attention || softmax of the scores) over the positions attended to, mean over rows."""
    log_q = scores.masked_fill(~seen, float("-inf")).log_softmax(-1).masked_fill(~seen, 0.0)
    return (torch.xlogy(target, target) - target * log_q).sum(-1).mean()


class Model(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.embed_tokens = nn.Embedding(cfg["vocab_size"], cfg["hidden_size"])
        self.layers = nn.ModuleList(Layer(cfg) for _ in range(cfg["num_hidden_layers"]))
        self.norm = RMSNorm(cfg["hidden_size"], cfg["rms_norm_eps"])
        for name, p in self.named_parameters():
            if p.dim() == 2:
                # Residual branches start at zero, so that depth costs nothing at first.
                nn.init.zeros_(p) if name.endswith(("o_proj.weight", "down_proj.weight")) else nn.init.normal_(p, std=0.02)

    def forward(self, tokens, pattern=None, quantised=False, with_kl=False):
        """Logits [rows, length, vocab] and each layer's KL loss. `pattern` is one role a layer; None is dense."""
        length = tokens.shape[1]
        rope = rope_tables(self.cfg, length, tokens.device)
        causal = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()
        h, mask, losses = self.embed_tokens(tokens), None, []
        for layer, role in zip(self.layers, pattern or "-" * len(self.layers)):
            h, mask, kl = layer(h, rope, causal, role, mask, quantised, with_kl)
            losses.append(kl)
        return F.linear(self.norm(h), self.embed_tokens.weight), losses


def nll(logits, targets):
    """Cross-entropy of each position, in nats."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


def bf16_tensors(model):
    return {"model." + name: p.detach().to("cpu", torch.bfloat16).contiguous() for name, p in model.named_parameters()}


def load_model(path, cfg, device="cpu"):
    from safetensors.torch import load_file

    model = Model(cfg)
    model.load_state_dict({name.removeprefix("model."): t.float() for name, t in load_file(path).items()})
    return model.to(device).eval()
