"""A DSA model of Hugging Face transformers under a plan, and the loss that trains the indexers it keeps.

For GLM-MoE-DSA and DeepSeek-V3.2, whose layers are patched in place. Needs torch and transformers::

    model = IndexCacheModel(AutoModelForCausalLM.from_pretrained(path), plan, context)
    out = model(input_ids, labels=input_ids)
    (out.loss + model.indexer_loss()).backward()

The loss reaches nothing but the Full layers' indexers, and the language-modelling loss reaches all the rest, as in DSA.
"""

import sys
from functools import partial
from typing import Any, Dict, List

import torch
from torch import nn

from ._calls import Context, Plan, sparse_attention, sparse_attention_workspace
from .constants import ROLE_FULL, ROLE_SHARED
from .descriptors import AttentionDesc
from .distillation import Distillation, scratch

# How each model's indexer turns its queries and keys: a function of the module that defines it.
_INDEXER_ROPE = {"GlmMoeDsaIndexer": "apply_rotary_pos_emb_interleave", "DeepseekV32Indexer": "apply_rotary_pos_emb"}
# Rows whose dense scores are held at once.
_ROWS = 128


class _Block:
    """A Full layer and the Shared layers it serves: what they attend to, and the loss so far."""

    def __init__(self, served: int):
        self.served, self.taught = served, 0
        self.selected: Any = None
        self.visible: Any = None
        self.rows: Dict[str, Any] = {}
        self.training: Any = None


class _Reuse(nn.Module):
    """In place of a Shared layer's indexer: what the Full layer before it selected."""

    def __init__(self, block: _Block):
        super().__init__()
        self._block = block

    def forward(self, *_: Any, **__: Any) -> torch.Tensor:
        return self._block.selected


class IndexCacheModel(nn.Module):
    """``model`` under ``plan``. Shared layers lose their indexer and attend to what the nearest Full layer before them
    selected. In training mode each Full layer's indexer learns the attention of all layers it serves, one layer at a
    time as they run, so that memory does not grow with their number; ``indexer_loss`` is the sum over Full layers.

    While ``warm_up`` is true, training attends to everything and so does the loss (the dense form); else both are over
    the selected. Evaluation always selects.

    ``context`` is of the device that the model is on. Rows may be padded or packed: each sees one range of keys.
    """

    def __init__(self, model: Any, plan: Plan, context: Context, warm_up: bool = False):
        super().__init__()
        layers = model.base_model.layers
        full = _full_layers(layers, plan)
        self.model, self.warm_up = model, warm_up
        self._context, self._collecting = context, False
        self._losses: List[torch.Tensor] = []
        for first, end in zip(full, full[1:] + [len(layers)]):
            block = _Block(end - first)
            layers[first].self_attn.indexer.register_forward_hook(partial(self._select, block), with_kwargs=True)
            for layer in layers[first:end]:
                seen: Dict[str, torch.Tensor] = {}
                for name in ("q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm"):
                    getattr(layer.self_attn, name).register_forward_hook(partial(self._keep, seen, name))
                layer.self_attn.register_forward_hook(partial(self._teach, block, seen), with_kwargs=True)
            for layer in layers[first + 1 : end]:
                layer.self_attn.indexer = _Reuse(block)
        # Where servers, and transformers for GLM, read the plan.
        model.config.indexer_types = ["full" if layer in full else "shared" for layer in range(len(layers))]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's; training keeps no cache of keys."""
        # Layers that gradient checkpointing runs again, from inside backward, are not collected again.
        self._collecting = self.training and torch.is_grad_enabled()
        if self._collecting:
            kwargs["use_cache"] = False
            self._losses = []
        try:
            return self.model(*args, **kwargs)
        finally:
            self._collecting = False

    def indexer_loss(self) -> torch.Tensor:
        """The distillation loss of the last forward pass in training mode. Once."""
        losses, self._losses = self._losses, []
        if not losses:
            raise RuntimeError("indexer_loss: expected a forward pass in training mode before each call")
        return torch.stack(losses).sum()

    # Hooks are bound methods with arguments, so that a deep copy of the model has its own state.

    def _select(self, block: _Block, indexer: Any, args: Any, kwargs: Any, selected: torch.Tensor) -> torch.Tensor:
        """Behind a Full layer's indexer."""
        hidden, q_latent, rope, mask = args[:4]
        visible = (mask if mask.dtype == torch.bool else mask == 0).expand(len(hidden), -1, -1)
        if self.training and torch.is_grad_enabled():
            # Gradient checkpointing asks for the same graph again, so not only when collecting.
            inputs = _indexer_inputs(indexer, hidden.detach(), q_latent.detach(), rope)
            if self._collecting:
                self._begin(block, visible, selected, inputs)
        if self.warm_up and self.training:
            everything = torch.arange(visible.shape[-1], dtype=torch.int32, device=visible.device)
            selected = everything.expand_as(visible)
        block.selected = selected
        return selected

    def _begin(self, block: _Block, visible: torch.Tensor, selected: torch.Tensor, inputs: Any) -> None:
        batch, length, keys = visible.shape
        if length != keys:
            raise ValueError(f"forward: expected no past keys in training mode, got {keys - length}")
        first = visible.int().argmax(-1)
        start = first + keys * torch.arange(batch, device=first.device)[:, None]
        end = start + visible.sum(-1)
        block.rows = {"row_start": start.int().flatten(), "row_end": end.int().flatten()}
        if self.warm_up:
            block.visible = visible
        else:
            # Positions count from the first key that the row sees. Where it sees fewer than topk, others were selected.
            indices = (selected - first[..., None]).masked_fill(~visible.gather(-1, selected.long()), -1)
            block.rows["indices"] = indices.int().flatten(0, 1)
        block.taught = 0
        block.training = Distillation(self._context, *(x.flatten(0, 1) for x in inputs), **block.rows)

    def _keep(self, seen: Any, name: str, module: Any, args: Any, out: torch.Tensor) -> None:
        """Behind a projection."""
        if self._collecting:
            seen[name] = out.detach()

    @torch.no_grad()
    def _teach(self, block: _Block, seen: Any, attention: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Behind a layer's attention, which is computed again from the projections that the layer made in any case."""
        if not self._collecting:
            return
        q, kv = _absorbed(attention, kwargs["position_embeddings"], **seen)
        seen.clear()
        lse = self._lse(block, q, kv, attention.scaling)
        q, kv = q.flatten(0, 1), kv.flatten(0, 1)
        block.training.add(1 / block.served, attention_q=q, kv=kv, lse=lse, softmax_scale=attention.scaling)
        block.taught += 1
        if block.taught == block.served:
            with torch.enable_grad():
                self._losses.append(block.training.loss())
            block.training, block.visible, block.rows = None, None, {}

    def _lse(self, block: _Block, q: torch.Tensor, kv: torch.Tensor, scale: float) -> torch.Tensor:
        """Log-sum-exp of a layer's scores, ``[rows, heads]``, over what its rows attend to."""
        lse = torch.empty(q.shape[:3], device=q.device)
        if block.visible is not None:
            for sequence, keys, visible, out in zip(q, kv, block.visible, lse):
                for r in range(0, len(sequence), _ROWS):
                    scores = (scale * torch.einsum("rhd,kd->rhk", sequence[r : r + _ROWS], keys)).float()
                    out[r : r + _ROWS] = scores.masked_fill(~visible[r : r + _ROWS, None], -torch.inf).logsumexp(-1)
            return lse.flatten(0, 1)
        q, kv, lse = q.flatten(0, 1), kv.flatten(0, 1), lse.flatten(0, 1)
        # One value a head, the fewest there can be: nothing reads them.
        out = q.new_empty(*q.shape[:2], 1)
        row_start, indices = block.rows["row_start"], block.rows["indices"]
        desc = AttentionDesc(q=q, kv=kv, out=out, lse=lse, row_start=row_start, softmax_scale=scale)
        workspace, stream = scratch(q.device, lambda: sparse_attention_workspace(self._context, desc, indices))
        sparse_attention(self._context, desc, indices, workspace=workspace, stream=stream)
        return lse


def _full_layers(layers: Any, plan: Plan) -> List[int]:
    """The plan's Full layers, or why the model cannot have this plan; before anything of it is changed."""
    planned = plan.get_info().decoder_layers
    if planned != len(layers):
        raise ValueError(f"plan: expected {len(layers)} layers as the model has, got {planned}")
    full = []
    for number, layer in enumerate(layers):
        role, indexer = plan.layer_role(number), getattr(layer.self_attn, "indexer", None)
        if role == ROLE_FULL:
            full.append(number)
        elif role != ROLE_SHARED:
            raise ValueError(f"plan: layer {number}: expected Full or Shared, got a layer without sparse attention")
        # Shared layers of a model that was made so have none.
        if type(indexer).__name__ not in _INDEXER_ROPE and (role == ROLE_FULL or indexer is not None):
            known = " or ".join(_INDEXER_ROPE)
            raise TypeError(f"model: layer {number}: expected an indexer, {known}, got {type(indexer).__name__}")
    return full


def _rope_of(module: Any, name: str) -> Any:
    return getattr(sys.modules[type(module).__module__], name)


def _indexer_inputs(indexer: Any, hidden: torch.Tensor, q_latent: torch.Tensor, rope: Any) -> Any:
    """Queries ``[batch, length, heads, dim]``, keys and head weights, every scale folded into the last."""
    turned = indexer.qk_rope_head_dim
    q = indexer.wq_b(q_latent).unflatten(-1, (indexer.n_heads, indexer.head_dim))
    k = indexer.k_norm(indexer.wk(hidden)).unsqueeze(2)
    rotate = _rope_of(indexer, _INDEXER_ROPE[type(indexer).__name__])
    q_rope, k_rope = rotate(q[..., :turned], k[..., :turned], *rope, unsqueeze_dim=2)
    q = torch.cat((q_rope, q[..., turned:]), -1)
    k = torch.cat((k_rope, k[..., turned:]), -1).squeeze(2)
    weights = indexer.weights_proj(hidden.to(indexer.weights_proj.weight.dtype)).float()
    return q, k, weights * (indexer.softmax_scale * indexer.n_heads**-0.5)


def _absorbed(
    attention: Any, rope: Any, q_b_proj: torch.Tensor, kv_a_proj_with_mqa: torch.Tensor, kv_a_layernorm: torch.Tensor
) -> Any:
    """Queries ``[batch, length, heads, width]`` and the KV rows they meet, ``[batch, length, width]``: latent, rope."""
    nope, turned = attention.qk_nope_head_dim, attention.qk_rope_head_dim
    q_nope, q_rope = q_b_proj.unflatten(-1, (-1, nope + turned)).split((nope, turned), -1)
    k_rope = kv_a_proj_with_mqa[..., attention.kv_lora_rank :].unsqueeze(2)
    q_rope, k_rope = _rope_of(attention, "apply_rotary_pos_emb_interleave")(q_rope, k_rope, *rope, unsqueeze_dim=2)
    w_uk = attention.kv_b_proj.weight.unflatten(0, (-1, nope + attention.v_head_dim))[:, :nope]
    q = torch.cat((torch.einsum("blhn,hnc->blhc", q_nope, w_uk), q_rope), -1)
    return q, torch.cat((kv_a_layernorm, k_rope.squeeze(2)), -1)
