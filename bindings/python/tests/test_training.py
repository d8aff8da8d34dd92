"""Models of transformers under a plan: against the unpatched model, its own Shared layers and float64 autograd."""

import copy
import math
import weakref

import pytest

import indexcache as ix

torch = pytest.importorskip("torch", reason="torch is not importable: nothing to train with")
transformers = pytest.importorskip("transformers", reason="transformers is not importable: no DSA model to patch")
if not hasattr(transformers, "GlmMoeDsaConfig") or not hasattr(transformers, "DeepseekV32Config"):
    pytest.skip("transformers has no GLM-MoE-DSA or DeepSeek-V3.2", allow_module_level=True)

from indexcache import training  # noqa: E402
from indexcache.distillation import Distillation  # noqa: E402
from indexcache.training import IndexCacheModel  # noqa: E402

LENGTH, TOPK, VOCABULARY = 40, 12, 64
FAMILIES = {
    "glm": (transformers.GlmMoeDsaConfig, transformers.GlmMoeDsaForCausalLM),
    "deepseek": (transformers.DeepseekV32Config, transformers.DeepseekV32ForCausalLM),
}
family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(params=["cpu", "cuda"])
def context(request):
    """Of the device on which the test makes all its tensors."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch has no CUDA device")
    backend = ix.BACKEND_CUDA if request.param == "cuda" else ix.BACKEND_CPU
    torch.set_default_device(request.param)
    yield ix.Context(ix.ContextDesc(backend=backend, threads=0 if request.param == "cuda" else 2))
    torch.set_default_device(None)


def same(a, b):
    """The same bits, or nearly: on a GPU torch adds up gradients in any order."""
    return torch.equal(a, b) if not a.is_cuda else torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def small(family, layers=4, attention="eager", **more):
    """Random weights, with a dense and a sparse MLP among them."""
    config, model = FAMILIES[family]
    sizes = dict(hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_attention_heads=4, n_group=1)
    sizes.update(num_key_value_heads=4, q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=12, qk_rope_head_dim=8)
    sizes.update(v_head_dim=16, index_n_heads=3, index_head_dim=16, n_routed_experts=4, num_experts_per_tok=2)
    torch.manual_seed(1)
    made = model(
        config(
            vocab_size=VOCABULARY,
            num_hidden_layers=layers,
            topk_group=1,
            index_topk=TOPK,
            first_k_dense_replace=layers - 1,
            max_position_embeddings=64,
            initializer_range=0.3,
            attn_implementation=attention,
            **sizes,
            **more,
        )
    )
    return made.eval()


def plan_of(pattern):
    return ix.Plan.from_pattern(ix.ModelDesc(layers=len(pattern), topk=TOPK), pattern)


def text(batch=2, length=LENGTH):
    torch.manual_seed(2)
    return torch.randint(VOCABULARY, (batch, length))


def indexers(model):
    return {n: p for n, p in model.named_parameters() if ".indexer." in n}


def record(model):
    """What each layer's indexer, or what stands in its place, gives."""
    found = {}

    def keep(layer):
        def hook(_, __, out):
            found[layer] = out.clone()

        return hook

    for number, layer in enumerate(model.base_model.layers):
        layer.self_attn.indexer.register_forward_hook(keep(number))
    return found


@family
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_all_full_changes_nothing(context, family, attention):
    model = small(family, attention=attention)
    with torch.no_grad():
        want = model(text()).logits
        got = IndexCacheModel(model, plan_of("FFFF"), context).eval()(text()).logits
    assert torch.equal(got, want)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_shared_layers_are_those_of_transformers(context, attention):
    """GLM has its own: the same logits, parameters and names of parameters; with a cache of keys too."""
    types = ["full", "shared", "full", "shared"]
    own = small("glm", attention=attention, indexer_types=types)
    model = small("glm", attention=attention)
    model.load_state_dict(own.state_dict(), strict=False)
    wrapped = IndexCacheModel(model, plan_of("FSFS"), context).eval()
    assert model.state_dict().keys() == own.state_dict().keys() and model.config.indexer_types == types
    with torch.no_grad():
        assert torch.equal(wrapped(text()).logits, own(text()).logits)
        tokens = [m.generate(text(), max_new_tokens=8, do_sample=False) for m in (model, own)]
    assert torch.equal(*tokens)
    # A model that was made with Shared layers takes the same plan, and no other.
    again = IndexCacheModel(own, plan_of("FSFS"), context).eval()
    with torch.no_grad():
        assert torch.equal(again(text()).logits, wrapped(text()).logits)


@family
def test_shared_layers_use_the_full_layers_indices(context, family):
    model = small(family)
    before = model.state_dict().keys()
    wrapped = IndexCacheModel(model, plan_of("FSFS"), context).eval()
    gone = before - model.state_dict().keys()
    assert {n.split(".")[2] for n in gone} == {"1", "3"} and all(".indexer." in n for n in gone) and gone
    found = record(model)
    with torch.no_grad():
        wrapped(text())
    assert found[0].shape == (2, LENGTH, TOPK)
    assert torch.equal(found[1], found[0]) and torch.equal(found[3], found[2])
    assert not torch.equal(found[2], found[0])


def rotated(x, interleaved):
    """Rotary position embedding of ``[batch, length, heads, dim]`` by complex numbers."""
    dim = x.shape[-1]
    speed = 10000.0 ** (-torch.arange(0, dim, 2).double() / dim)
    angle = torch.arange(x.shape[1]).double()[:, None] * speed
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    turned = torch.complex(a, b) * torch.polar(torch.ones_like(angle), angle)[:, None]
    return torch.cat((turned.real, turned.imag), -1)


def scores_in_float64(family, indexer, hidden, q_latent):
    n, d, r = indexer.n_heads, indexer.head_dim, indexer.qk_rope_head_dim
    q = indexer.wq_b(q_latent.double()).unflatten(-1, (n, d))
    k = indexer.k_norm(indexer.wk(hidden.double())).unsqueeze(2)
    q, k = (torch.cat((rotated(x[..., :r], family == "glm"), x[..., r:]), -1) for x in (q, k))
    weights = indexer.weights_proj(hidden.double())
    return (torch.einsum("bthd,bsd->bths", q, k.squeeze(2)).relu() * weights.unsqueeze(-1)).sum(2) * (n * d) ** -0.5


def reference(family, model, pattern, dense, visible, tokens, **inputs):
    """The loss and its gradients by the indexers' parameters in float64; the attention is what transformers returns."""
    seen = {}

    def keep(number):
        def hook(_, args, out):
            seen[number] = args[0], args[1], out

        return hook

    hooks = [
        layer.self_attn.indexer.register_forward_hook(keep(number))
        for number, layer in enumerate(model.base_model.layers)
        if pattern[number] == "F"
    ]
    with torch.no_grad():
        attentions = model(tokens, output_attentions=True, use_cache=False, **inputs).attentions
    for hook in hooks:
        hook.remove()
    total, grads = 0.0, {}
    full = [layer for layer, role in enumerate(pattern) if role == "F"]
    for first, end in zip(full, full[1:] + [len(pattern)]):
        indexer = copy.deepcopy(model.base_model.layers[first].self_attn.indexer).double()
        hidden, q_latent, selected = seen[first]
        inside = visible.clone()
        if not dense:
            inside &= torch.zeros_like(visible).scatter(-1, selected.long(), True)
        rows = inside.any(-1)
        scores = scores_in_float64(family, indexer, hidden, q_latent).masked_fill(~inside, -math.inf)
        log_q = scores[rows].log_softmax(-1).masked_fill(~inside[rows], 0)
        loss = 0
        for layer in range(first, end):
            p = attentions[layer].double().sum(1)[rows] * inside[rows]
            p = p / p.sum(-1, keepdim=True)
            loss = loss + (torch.xlogy(p, p) - p * log_q).sum(-1).mean() / (end - first)
        loss.backward()
        total += loss.item()
        name = f"model.layers.{first}.self_attn.indexer."
        grads.update({name + n: p.grad for n, p in indexer.named_parameters()})
    return total, grads


@family
@pytest.mark.parametrize("warm_up", [True, False])
@pytest.mark.parametrize("layout", ["whole", "padded", "packed"])
def test_loss_and_gradients_in_float64(context, family, warm_up, layout):
    pattern = "FSSFFS"
    model = small(family, layers=6)
    tokens, inputs = text(), {}
    visible = torch.ones(2, LENGTH, LENGTH, dtype=torch.bool).tril()
    if layout == "padded":  # On the left, and on the right.
        mask = torch.ones_like(tokens)
        mask[0, :7], mask[1, -9:] = 0, 0
        visible &= mask.bool()[:, None, :]
        inputs["attention_mask"] = mask
    elif layout == "packed":  # Two texts a row.
        inputs["position_ids"] = positions = torch.arange(LENGTH).repeat(2, 1)
        for row, first in enumerate((14, 30)):
            positions[row, first:] -= first
            visible[row, first:, :first] = False
    wrapped = IndexCacheModel(model, plan_of(pattern), context, warm_up=warm_up).train()
    wrapped(tokens, **inputs)
    loss = wrapped.indexer_loss()
    loss.backward()
    got = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    # In training mode still: warm_up attends to everything.
    want, grads = reference(family, model, pattern, warm_up, visible, tokens, **inputs)
    assert got.keys() == grads.keys() == indexers(model).keys()
    assert abs(loss.item() - want) <= 1e-5 * want
    for name, grad in grads.items():
        assert (got[name] - grad).norm() <= 1e-4 * grad.norm(), name


@family
def test_each_loss_reaches_its_own(context, family):
    """The distillation loss the Full layers' indexers, the language-modelling loss all the rest."""
    model = small(family)
    wrapped = IndexCacheModel(model, plan_of("FSSF"), context).train()
    out = wrapped(text(), labels=text())
    (out.loss + wrapped.indexer_loss()).backward()
    together = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    wrapped(text(), labels=text()).loss.backward()
    assert all(p.grad is None for p in indexers(model).values())
    for name, p in model.named_parameters():
        if p.grad is not None:
            assert same(p.grad, together.pop(name)), name
    assert together.keys() == indexers(model).keys() and all(g.abs().max() > 0 for g in together.values())


@family
def test_gradient_checkpointing(context, family):
    """Layers run twice, and the loss is that of one pass."""
    runs = []
    for checkpointing in (False, True):
        model = small(family)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        wrapped = IndexCacheModel(model, plan_of("FSSF"), context).train()
        out = wrapped(text(), labels=text())
        loss = wrapped.indexer_loss()
        (out.loss + loss).backward()
        runs.append((loss, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (loss, grads), (again, grads_again) = runs
    assert same(loss, again) and grads.keys() == grads_again.keys()
    assert all(same(grads[n], grads_again[n]) for n in grads)


@family
def test_a_copy_is_of_its_own(context, family):
    wrapped = IndexCacheModel(small(family), plan_of("FSSF"), context).train()
    copied = copy.deepcopy(wrapped)
    with torch.no_grad():
        for p in indexers(copied).values():
            p.mul_(2)
    losses = []
    for model in (wrapped, copied, wrapped):
        model(text())
        losses.append(model.indexer_loss().item())
    assert losses[0] == losses[2] != losses[1]
    wrapped(text())
    with pytest.raises(RuntimeError, match="indexer_loss: expected a forward pass"):
        copied.indexer_loss()


@family
@pytest.mark.parametrize("warm_up", [True, False])
def test_memory_does_not_grow_with_the_served_layers(context, family, warm_up, monkeypatch):
    """A Full layer that serves 1 or 7 others: autograd keeps as much more than without the loss, and nothing that a layer
    was taught from outlives its turn."""
    more = []
    for layers in (2, 8):
        wrapped = IndexCacheModel(small(family, layers), plan_of("F" + "S" * (layers - 1)), context, warm_up)
        alive, add, absorbed = [], Distillation.add, training._absorbed

        def watch(tensors):
            # Of a view, the tensor that it is of is what would be kept.
            alive.extend(weakref.ref(t if t._base is None else t._base) for t in tensors if torch.is_tensor(t))

        def watched_add(self, share, **tensors):
            watch(tensors.values())
            add(self, share, **tensors)

        def watched_absorbed(attention, rope, **projections):
            alive.extend(map(weakref.ref, projections.values()))
            return absorbed(attention, rope, **projections)

        monkeypatch.setattr(Distillation, "add", watched_add)
        monkeypatch.setattr(training, "_absorbed", watched_absorbed)
        kept = []
        for mode in (True, False):
            wrapped.train(mode)
            saved = {}

            def keep(x):
                saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes(), x
                return x

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                out = wrapped(text(), use_cache=False)
            kept.append(sum(n for n, _ in saved.values()))
        monkeypatch.undo()
        assert out.logits.requires_grad and len(alive) == 6 * layers and not any(ref() is not None for ref in alive)
        more.append(kept[0] - kept[1])
    assert more[0] == more[1] > 0


@family
def test_saved_and_loaded(context, family, tmp_path):
    model = small(family)
    wrapped = IndexCacheModel(model, plan_of("FSSF"), context).eval()
    model.save_pretrained(tmp_path)
    text_of_config = (tmp_path / "config.json").read_text()
    plan = ix.Plan.from_hf_config(text_of_config)
    assert plan.export(ix.EXPORT_PATTERN) == "FSSF"
    loaded = FAMILIES[family][1].from_pretrained(tmp_path, attn_implementation="eager")
    again = IndexCacheModel(loaded, plan, context).eval()
    with torch.no_grad():
        assert torch.equal(again(text()).logits, wrapped(text()).logits)


def test_refusals(context):
    model = small("glm", indexer_types=["full", "shared", "full", "full"])
    with pytest.raises(ValueError, match="plan: expected 4 layers as the model has, got 3"):
        IndexCacheModel(model, plan_of("FSS"), context)
    with pytest.raises(TypeError, match="model: layer 1: expected an indexer, .*, got NoneType"):
        IndexCacheModel(model, plan_of("FFSF"), context)
    assert model.base_model.layers[2].self_attn.indexer is not None  # Nothing was changed.
    wrapped = IndexCacheModel(model, plan_of("FSFF"), context)
    with pytest.raises(TypeError, match="model: layer 1: expected an indexer, .*, got _Reuse"):
        IndexCacheModel(model, plan_of("FSFF"), context)
    wrapped.eval()(text())
    with pytest.raises(RuntimeError, match="indexer_loss: expected a forward pass in training mode"):
        wrapped.indexer_loss()
    wrapped.train()(text())
    wrapped.indexer_loss()
    with pytest.raises(RuntimeError, match="before each call"):
        wrapped.indexer_loss()
    cache = transformers.DynamicCache(config=model.config)
    wrapped.eval()(text(), past_key_values=cache)
    with pytest.raises(ValueError, match="forward: expected no past keys in training mode, got 40"):
        wrapped.train()(text(), past_key_values=cache)
