"""The distillation loss: numpy arrays against plain f64, torch tensors against float64 autograd."""

import numpy as np
import pytest

import indexcache as ix

try:
    import torch
except ImportError:
    torch = None
else:
    from indexcache.distillation import Distillation

needs_torch = pytest.mark.skipif(torch is None, reason="torch is not importable: no autograd to compare with")

LENGTHS = (1, 30, 0, 12)
HEADS, DIM, ATTENTION_HEADS, D_QK, TOPK, SCALE = 3, 16, 4, 24, 7, 0.2


def ragged(rng):
    """Causal rows of sequences one after the other, an empty row after each: float32 values and int32 bounds."""
    start, end, at = [], [], 0
    for n in LENGTHS:
        start += [at] * (n + 1)
        end += [*range(at + 1, at + n + 1), at]
        at += n
    rows = len(start)
    shapes = dict(q=(rows, HEADS, DIM), k=(at, DIM), weights=(rows, HEADS))
    shapes.update(attention_q=(rows, ATTENTION_HEADS, D_QK), kv=(at, D_QK))
    x = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    x["weights"] *= 0.3
    x["row_start"], x["row_end"] = np.array(start, np.int32), np.array(end, np.int32)
    lengths = x["row_end"] - x["row_start"]
    x["indices"] = np.full((rows, TOPK), -1, np.int32)
    for r, n in enumerate(lengths):
        some = rng.permutation(n)[:TOPK]
        x["indices"][r, : len(some)] = some
    x["lse"] = np.zeros((rows, ATTENTION_HEADS), np.float32)
    for r in range(rows):
        scores = SCALE * x["attention_q"][r] @ x["kv"][start[r] : end[r]].T
        if scores.size:
            x["lse"][r] = np.log(np.exp(scores).sum(-1))
    x["target"] = rng.exponential(size=(rows, max(LENGTHS) + 1)).astype(np.float32)
    return x


def keys_of(x, r, restricted):
    n = x["row_end"][r] - x["row_start"][r]
    positions = x["indices"][r][x["indices"][r] >= 0] if restricted else np.arange(n)
    return positions, positions + x["row_start"][r]


def test_probabilities_of_attention_are_a_target(context, rng):
    x = ragged(rng)
    rows = len(x["q"])
    out, lse = np.zeros((rows, ATTENTION_HEADS, 8), np.float32), np.zeros((rows, ATTENTION_HEADS), np.float32)
    probs = np.zeros((rows, TOPK), np.float32)
    attention = ix.AttentionDesc(
        q=x["attention_q"], kv=x["kv"], row_start=x["row_start"], softmax_scale=SCALE, out=out, lse=lse, probs=probs
    )
    ix.sparse_attention(context, attention, x["indices"])
    names = ("q", "k", "weights", "row_start", "row_end", "indices")
    got = []
    for teacher in (
        dict(target=probs),
        dict(attention_q=x["attention_q"], kv=x["kv"], lse=lse, softmax_scale=SCALE),
    ):
        grads, loss = zeros_like(x), np.zeros(1, np.float32)
        ix.distill(context, ix.DistillDesc(**{n: x[n] for n in names}, **teacher, loss=loss, **grads))
        got.append([loss, *grads.values()])
    assert got[0][0] > 0.01
    for a, b in zip(*got):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def zeros_like(x):
    return {"grad_" + n: np.zeros_like(x[n]) for n in ("q", "k", "weights")}


def test_loss_by_numpy(context, rng):
    x = ragged(rng)
    loss, live = 0.0, 0
    for r in range(len(x["q"])):
        positions, keys = keys_of(x, r, False)
        if len(keys) == 0:
            continue
        scores = x["weights"][r].astype(np.float64) @ np.maximum(x["q"][r].astype(np.float64) @ x["k"][keys].T, 0)
        log_q = scores - scores.max() - np.log(np.exp(scores - scores.max()).sum())
        p = x["target"][r, positions].astype(np.float64)
        p /= p.sum()
        loss, live = loss + (p * (np.log(p) - log_q)).sum(), live + 1
    names = ("q", "k", "weights", "row_start", "row_end", "target")
    out = np.ones(1, np.float32)
    desc = ix.DistillDesc(**{n: x[n] for n in names}, loss=out, layer_weight=0.25)
    ix.distill(context, desc)
    np.testing.assert_allclose(out[0] - 1, 0.25 * loss / live, rtol=1e-5)
    workspace = np.empty(ix.distill_workspace(context, desc), np.uint8)
    ix.distill(context, desc, workspace)
    np.testing.assert_allclose(out[0] - 1, 0.5 * loss / live, rtol=1e-5)
    with pytest.raises(ix.Error, match="BUFFER_TOO_SMALL"):
        ix.distill(context, desc, workspace[:-1])


def test_refusals(context, rng):
    x = ragged(rng)
    names = ("q", "k", "weights", "row_start", "row_end", "target")
    out, grads = np.zeros(1, np.float32), zeros_like(x)
    x["k"][5, 3] = np.nan
    with pytest.raises(ix.Error, match="idxc_distill: k: expected finite numbers, got NaN in key 5") as e:
        ix.distill(context, ix.DistillDesc(**{n: x[n] for n in names}, loss=out, **grads))
    assert e.value.status == ix.ERR_INVALID
    assert out[0] == 0 and all((g == 0).all() for g in grads.values())
    with pytest.raises(ix.Error, match="target: expected a target, or attention_q, kv and lse"):
        ix.distill(context, ix.DistillDesc(**{n: x[n] for n in names[:5]}, loss=out))


def by_autograd(x, tensors, restricted, targets):
    """The loss in float64; ``targets``: share, and None for the given target or attention tensors."""
    q, k, weights = (t.detach().double().requires_grad_() for t in tensors)
    total, live = 0, 0
    for r in range(len(x["q"])):
        positions, keys = keys_of(x, r, restricted)
        if len(keys) == 0:
            continue
        live += 1
        scores = (weights[r][:, None] * torch.relu(q[r] @ k[keys].T)).sum(0)
        for share, attention in targets:
            if attention is None:
                columns = np.flatnonzero(x["indices"][r] >= 0) if restricted else positions
                p = torch.from_numpy(x["target"][r, columns]).double()
            else:
                attention_q, kv = (t.detach().double() for t in attention)
                lse = torch.from_numpy(x["lse"][r]).double()
                p = (SCALE * attention_q[r] @ kv[keys].T - lse[:, None]).exp().sum(0)
            p = p / p.sum()
            total = total + share * torch.nn.functional.kl_div(scores.log_softmax(0), p, reduction="sum")
    loss = total / live
    return loss, torch.autograd.grad(loss, (q, k, weights))


def on(device, context):
    """The context of a device; skips without one."""
    if device == "cpu":
        return context
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    return ix.Context(ix.ContextDesc(backend=ix.BACKEND_CUDA))


@needs_torch
@pytest.mark.parametrize("restricted", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_gradients_by_autograd(context, rng, restricted, dtype, device):
    """Two served layers, one with a given target and one with its own attention; upstream gradient 3."""
    context = on(device, context)
    x = ragged(rng)
    if restricted:
        x["target"] = x["target"][:, :TOPK].copy()
    t = {n: torch.from_numpy(v).to(device) for n, v in x.items()}
    for n in ("q", "k", "attention_q", "kv"):
        t[n] = t[n].to(getattr(torch, dtype))
    tensors = [t[n].requires_grad_() for n in ("q", "k", "weights")]
    indices = t["indices"] if restricted else None
    training = Distillation(context, *tensors, row_start=t["row_start"], row_end=t["row_end"], indices=indices)
    training.add(0.75, target=t["target"])
    attention = {n: t[n] for n in ("attention_q", "kv", "lse")}
    training.add(0.25, **attention, softmax_scale=SCALE)
    loss = training.loss()
    (3 * loss).backward()

    targets = [(0.75, None), (0.25, (t["attention_q"].cpu(), t["kv"].cpu()))]
    want, grads = by_autograd(x, [v.cpu() for v in tensors], restricted, targets)
    assert abs(loss.item() - want.item()) <= 1e-5 * want.item()
    for got, grad in zip(tensors, grads):
        assert got.grad.dtype == got.dtype
        off = (got.grad.cpu().double() - 3 * grad).abs()
        # bfloat16 gradients are rounded to it at the end.
        rounding = 2.0**-8 if got.dtype == torch.bfloat16 else 1e-4
        assert (off <= rounding * 3 * grad.abs() + 5e-6 * 3 * grad.abs().max()).all()


@needs_torch
def test_cuda_work_is_on_the_current_stream(context, rng):
    """After what its stream has queued, which a call on another stream would overtake."""
    context = on("cuda", context)
    t = {n: torch.from_numpy(v).cuda() for n, v in ragged(rng).items()}
    bounds = {n: t[n] for n in ("row_start", "row_end")}

    def loss(q):
        training = Distillation(context, q, t["k"], t["weights"], **bounds)
        training.add(1.0, target=t["target"])
        return training.loss()

    want = loss(t["q"]).item()
    late = torch.zeros_like(t["q"])
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)
        late.copy_(t["q"])
        got = loss(late)
    torch.cuda.synchronize()
    assert got.item() == want


@needs_torch
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_only_what_requires_a_gradient_gets_one(context, rng, device):
    context = on(device, context)
    x = {n: torch.from_numpy(v).to(device) for n, v in ragged(rng).items()}
    q, k, weights = (x[n] for n in ("q", "k", "weights"))
    k.requires_grad_()
    training = Distillation(context, q, k, weights, row_start=x["row_start"], row_end=x["row_end"])
    training.add(1.0, target=x["target"])
    training.loss().backward()
    assert q.grad is None and weights.grad is None and k.grad.abs().max() > 0
    with pytest.raises(RuntimeError, match="loss\\(\\) was taken"):
        training.add(1.0, target=x["target"])


@needs_torch
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_strided_tensors_are_used_in_place(context, rng, device):
    """Parts of wider tensors are no copies; what would need one is refused."""
    context = on(device, context)
    x = {n: torch.from_numpy(v).to(device) for n, v in ragged(rng).items()}
    wide, bounds = torch.cat([x["k"], x["k"] + 1], 1), {n: x[n] for n in ("row_start", "row_end")}
    losses = []
    for k in (x["k"], wide[:, :DIM]):
        training = Distillation(context, x["q"], k, x["weights"], **bounds)
        training.add(1.0, target=x["target"])
        losses.append(training.loss().item())
    assert losses[0] == losses[1]
    training = Distillation(context, x["q"], wide[:, ::2], x["weights"], **bounds)
    with pytest.raises(ix.Error, match="k: expected stride 1 in the last dimension"):
        training.add(1.0, target=x["target"])
