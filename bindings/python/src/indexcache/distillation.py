"""The multi-layer distillation loss of a Full layer's indexer under torch autograd. Needs torch.

A Full layer's indexer learns the attention of itself and of the Shared layers that it serves (arXiv 2603.12201). Layers are
added one by one, as their attention is computed, and memory does not grow with their number::

    training = Distillation(context, q, k, weights, row_end=ends)
    for layer in served:  # The Full layer itself among them.
        training.add(1 / len(served), attention_q=layer.q, kv=layer.kv, lse=layer.lse, softmax_scale=scale)
    training.loss().backward()
"""

from typing import Any, Callable, Optional, Tuple

import torch

from ._calls import Context, distill, distill_workspace
from .descriptors import DistillDesc


def scratch(device: torch.device, size: Callable[[], int]) -> Tuple[Optional[torch.Tensor], Optional[int]]:
    """Workspace and stream of a call on ``device``: torch's current stream, on which its allocator orders reuse."""
    if device.type != "cuda":
        return None, None
    return torch.empty(size(), dtype=torch.uint8, device=device), torch.cuda.current_stream(device).cuda_stream


class _Loss(torch.autograd.Function):
    """The value and gradients that were accumulated, as a function of ``q``, ``k`` and ``weights``."""

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, weights: Any, loss: Any, grads: Any) -> Any:
        ctx.grads = grads
        ctx.dtypes = [x.dtype for x in (q, k, weights)]
        return loss.clone().squeeze(0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, by_loss: Any) -> Any:
        grads = [None if g is None else (g * by_loss).to(d) for g, d in zip(ctx.grads, ctx.dtypes)]
        return (*grads, None, None)


class Distillation:
    """Loss of one Full layer's indexer over the layers that it serves.

    ``q``, ``k``, ``weights``, ``row_start``, ``row_end`` and ``indices`` are those of ``DistillDesc``: torch tensors in
    memory of the context's device, used without a copy and, on a GPU, on torch's current stream. Whichever of the first
    three require a gradient get one. They must not change between the first ``add`` and ``loss``, which ends the object's
    use.
    """

    def __init__(
        self,
        context: Context,
        q: torch.Tensor,
        k: torch.Tensor,
        weights: torch.Tensor,
        *,
        row_start: Optional[torch.Tensor] = None,
        row_end: Optional[torch.Tensor] = None,
        indices: Optional[torch.Tensor] = None,
    ):
        self._context, self._inputs = context, (q, k, weights)
        self._rows = {"row_start": row_start, "row_end": row_end, "indices": indices}
        self._loss = torch.zeros(1, device=q.device)
        self._grads: Any = [
            torch.zeros(x.shape, device=x.device) if x.requires_grad else None for x in self._inputs
        ]

    def _live(self) -> Any:
        if self._grads is None:
            raise RuntimeError("Distillation: loss() was taken; begin a new one")
        return self._grads

    def add(
        self,
        layer_weight: float,
        *,
        target: Optional[torch.Tensor] = None,
        attention_q: Optional[torch.Tensor] = None,
        kv: Optional[torch.Tensor] = None,
        lse: Optional[torch.Tensor] = None,
        softmax_scale: float = 0.0,
    ) -> None:
        """Adds a served layer: its attention as ``target``, or computed from the other three. They get no gradient."""

        def plain(x: Optional[torch.Tensor]) -> Optional[torch.Tensor]:
            return None if x is None else x.detach()

        q, k, weights = map(plain, self._inputs)
        grad_q, grad_k, grad_weights = self._live()
        desc = DistillDesc(
            q=q,
            k=k,
            weights=weights,
            loss=self._loss,
            grad_q=grad_q,
            grad_k=grad_k,
            grad_weights=grad_weights,
            target=plain(target),
            attention_q=plain(attention_q),
            kv=plain(kv),
            lse=plain(lse),
            softmax_scale=softmax_scale,
            layer_weight=layer_weight,
            **self._rows,
        )
        workspace, stream = scratch(q.device, lambda: distill_workspace(self._context, desc))
        distill(self._context, desc, workspace, stream)

    def loss(self) -> torch.Tensor:
        """The loss over the layers that were added, a scalar; its gradient reaches ``q``, ``k`` and ``weights``. Once:
        autograd holds what was accumulated."""
        grads, self._grads = self._live(), None
        return _Loss.apply(*self._inputs, self._loss, grads)
