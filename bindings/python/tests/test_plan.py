"""Plans through the binding: every way to make one, what it says, what it refuses."""

import json

import pytest

import indexcache as ix

GLM_QUARTER = "FFSFSSSFSSFSFSSSSSSSFSSSSSSFSSSFSFSSSSFFFFFSSSFFSSSFSSSSSSSFSSSFSSSSSSFSFSSSS"


def model(layers, topk=2048, **kw):
    return ix.ModelDesc(layers=layers, topk=topk, **kw)


def pattern_of(plan):
    return plan.export(ix.EXPORT_PATTERN)


def test_every_spelling_of_one_pattern():
    want = "FFFSSSFSSSFS"
    full = [i for i, c in enumerate(want) if c == "F"]
    m = model(len(want))
    plans = [
        ix.Plan.from_pattern(m, want),
        ix.Plan.from_indexer_types(m, ["full" if c == "F" else "shared" for c in want]),
        ix.Plan.from_freq(m, ix.DIALECT_HF, 4, 3),
        ix.Plan.from_source_layers(m, full),
        ix.Plan.from_hf_config(
            json.dumps(
                {
                    "model_type": "glm_moe_dsa",
                    "num_hidden_layers": len(want),
                    "index_topk": 2048,
                    "index_head_dim": 128,
                    "index_topk_pattern": want,
                }
            )
        ),
    ]
    assert [pattern_of(p) for p in plans] == [want] * 5
    assert len({p.get_info().fingerprint for p in plans[:4]}) == 1
    assert [p.get_info().field for p in plans] == [ix.FIELD_ARGUMENT] * 4 + [ix.FIELD_TOPK_PATTERN]
    assert json.loads(plans[0].export(ix.EXPORT_SOURCE_LAYERS)) == full
    assert json.loads(plans[0].export(ix.EXPORT_INDEXER_TYPES))[3] == "shared"
    assert json.loads(plans[0].export(ix.EXPORT_FREQ, ix.DIALECT_HF))["index_topk_freq"] == 4
    assert json.loads(plans[0].export(ix.EXPORT_JSON))["pattern"] == want


def test_default_offset():
    assert pattern_of(ix.Plan.from_freq(model(6), ix.DIALECT_HF, 2)) == "FFSFSF"


def test_layers():
    p = ix.Plan.from_pattern(model(len(GLM_QUARTER)), GLM_QUARTER)
    info = p.get_info()
    assert (info.full_layers, info.shared_layers) == (GLM_QUARTER.count("F"), GLM_QUARTER.count("S"))
    assert (info.topk, info.row_bytes, info.index_k_slots) == (2048, 8192, info.full_layers)
    slot, source = -1, -1
    for layer, letter in enumerate(GLM_QUARTER):
        if letter == "F":
            slot, source = slot + 1, layer
        got = p.layer_get_info(layer)
        assert got.role == p.layer_role(layer) == (ix.ROLE_FULL if letter == "F" else ix.ROLE_SHARED)
        assert (got.source_layer, got.index_k_slot) == (source, slot if letter == "F" else -1)


@pytest.mark.parametrize(
    "pattern, text",
    [
        ("FSF", "3 entries but the model has 4"),
        ("SFFF", "S"),
        ("FXFF", "X"),
        ("-SFF", "S"),
        ("", "0 entries"),
    ],
)
def test_refused_patterns(pattern, text):
    with pytest.raises(ix.Error, match=text) as e:
        ix.Plan.from_pattern(model(4), pattern)
    assert e.value.status == ix.ERR_CONFIG and e.value.text.startswith("idxc_plan_from_pattern: ")


def test_other_refusals():
    for call in (
        lambda: ix.Plan.from_freq(model(4), ix.DIALECT_HF, 0),
        lambda: ix.Plan.from_indexer_types(model(4), ["full", "shard", "full", "full"]),
        lambda: ix.Plan.from_source_layers(model(4), [1, 2]),
        lambda: ix.Plan.from_pattern(model(4, topk=0), "FFFF"),
        lambda: ix.Plan.from_hf_config(b"{"),
        lambda: ix.Plan.from_hf_config(b"\xff"),
        lambda: ix.Plan.from_hf_config("{}"),
    ):
        with pytest.raises(ix.Error) as e:
            call()
        assert e.value.name == "IDXC_ERR_CONFIG"


def test_garbage():
    p = ix.Plan.from_pattern(model(4), "FSFS")
    for call in (
        lambda: p.layer_role(4),
        lambda: p.layer_role(-1),
        lambda: p.layer_get_info(2**31 - 1),
        lambda: p.slice(3, 1),
        lambda: p.slice(0, 9),
        lambda: p.slice(0, 2, flags=64),
        lambda: p.export(99),
        lambda: p.export(ix.EXPORT_FREQ, 99),
        lambda: ix.Plan.from_freq(model(4), 99, 2),
        lambda: ix.Plan.from_pattern(model(4, flags=64), "FSFS"),
    ):
        with pytest.raises(ix.Error) as e:
            call()
        assert e.value.name == "IDXC_ERR_INVALID" and e.value.text.startswith("idxc_plan_")
    with pytest.raises(TypeError):
        ix.Plan()
    with pytest.raises(ValueError, match="NUL"):
        ix.Plan.from_pattern(model(2), "FS\0S")
    with pytest.raises(OverflowError):
        ix.Plan.from_pattern(model(2**32 + 2), "FS")
    with pytest.raises(OverflowError):
        ix.Plan.from_source_layers(model(2), [0, 2**64])
