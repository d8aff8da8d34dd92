//! Model configs: what each spelling in each model's config.json means, and what is refused.

#![allow(clippy::unwrap_used, clippy::panic)]

use indexcache::error::{Error, Status};
use indexcache::plan::{Dialect, Field, HfOptions, Plan, Role, Spelling};
use proptest::prelude::*;
use serde_json::{Value, json};

const MODELS: [&str; 8] = [
    "deepseek_v32",
    "deepseek_v4_1_flash",
    "deepseek_v4_flash",
    "glm_5_1",
    "glm_5_2",
    "glm_5_3_flash",
    "hy4_preview",
    "minimax_m3",
];

const GLM52: &str =
    "FFFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSS";

fn config(model: &str) -> Value {
    let path = format!("{}/tests/data/configs/{model}.json", env!("CARGO_MANIFEST_DIR"));
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// The model's own fields.
fn home(config: &mut Value) -> &mut Value {
    if config.get("text_config").is_some() { &mut config["text_config"] } else { config }
}

/// The config of `model` with some of its own fields replaced; null removes.
fn with(model: &str, fields: Value) -> Value {
    let mut config = config(model);
    for (key, value) in fields.as_object().unwrap() {
        home(&mut config)[key] = value.clone();
    }
    config
}

fn read(config: &Value) -> Result<Plan, Error> {
    Plan::from_hf_config(&serde_json::to_vec(config).unwrap())
}

fn read_with(config: &Value, options: &HfOptions<'_>) -> Result<Plan, Error> {
    Plan::from_hf_config_with(&serde_json::to_vec(config).unwrap(), options)
}

#[track_caller]
fn refused(config: &Value, message: &str) {
    let error = read(config).unwrap_err();
    assert_eq!(error.status, Status::Config);
    assert_eq!(error.message, message);
}

fn field(plan: &Plan) -> (&'static str, Option<Dialect>) {
    (plan.origin().field.name(), plan.origin().dialect)
}

#[test]
fn published_models() {
    let v32 = "F".repeat(61);
    let glm51 = "F".repeat(78);
    let m3 = format!("---{}", "F".repeat(57));
    #[rustfmt::skip]
    let table = [
        // model, pattern, field, top-k, bytes a row, draft role, index-K bytes a token, saved
        ("deepseek_v32", v32.as_str(), "default", 2048, 8192, Some(Role::Full), 62.0 * 132.0, 0.0),
        ("glm_5_1", &glm51, "default", 2048, 8192, Some(Role::Full), 79.0 * 132.0, 0.0),
        ("glm_5_2", GLM52, "indexer_types", 2048, 8192, Some(Role::Full), 22.0 * 132.0, 57.0 * 132.0),
        // Keys pooled by 4, and the incomplete pool of up to 3 on top of the selection.
        ("glm_5_3_flash", "---F---F---F---F---F---F---F---F---F---F---F-", "indexer_types",
            2048, 4 * 2051, Some(Role::Full), 12.0 * 33.0, 0.0),
        // One row of index K for 4 tokens; the draft layer attends a window only.
        ("deepseek_v4_flash", "--F-F-F-F-F-F-F-F-F-F-F-F-F-F-F-F-F-F-F-F-F", "default",
            512, 2048, Some(Role::None), 21.0 * 33.0, 0.0),
        // Four layers publish index K: 2, 8 and 14 a row for 2 tokens, 20 for each.
        ("deepseek_v4_1_flash", "--FSSSSSFSSSSSFSSSSSFSSSFSSSFSSSFSSSFSSS", "index_source_layer_ids",
            512, 2048, Some(Role::None), 3.0 * 66.0 + 132.0, 18.0 * 66.0 + 20.0 * 132.0 - 330.0),
        // 16 blocks for each of 4 KV heads; bf16 index K.
        ("minimax_m3", &m3, "default", 16, 256, None, 57.0 * 256.0, 0.0),
        ("hy4_preview", "FFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSF",
            "indexer_types", 2048, 8192, Some(Role::Full), 22.0 * 132.0, 57.0 * 132.0),
    ];
    assert_eq!(table.len(), MODELS.len());
    for (model, letters, decided, topk, row, draft, held, saved) in table {
        let plan = read(&config(model)).unwrap();
        assert_eq!(plan.letters(), letters, "{model}");
        assert_eq!(field(&plan), (decided, None), "{model}");
        assert_eq!((plan.model().topk, plan.row_bytes()), (topk, row), "{model}");
        assert_eq!(plan.role(plan.decoder_layers()).ok(), draft, "{model}");
        assert_eq!(plan.index_k_bytes_per_token(), held, "{model}");
        assert_eq!(plan.index_k_bytes_saved_per_token(), saved, "{model}");
        assert_eq!(plan.inactive(), None, "{model}");
    }
}

#[test]
fn dimensions_and_flags() {
    let model = |name| *read(&config(name)).unwrap().model();
    let v32 = model("deepseek_v32");
    assert_eq!((v32.index_heads, v32.index_head_dim, v32.attention_heads), (64, 128, 128));
    assert_eq!((v32.kv_lora_rank, v32.rope_head_dim, v32.sink), (512, 64, false));
    let glm = model("glm_5_2");
    assert!(glm.mtp_shares && glm.mtp_layers == 1);
    let flash = model("glm_5_3_flash");
    assert_eq!((flash.key_pool, flash.always_tail, flash.rope_head_dim), (4, true, 0));
    let m3 = model("minimax_m3");
    assert_eq!((m3.block, m3.selections, m3.index_heads), (128, 4, 4));
    assert!(model("hy4_preview").sink);
    let v4 = read(&config("deepseek_v4_flash")).unwrap();
    let layer = v4.layer(2).unwrap();
    assert_eq!((layer.block, layer.key_pool), (4, 4));
}

#[test]
fn fields_are_the_model_s_own() {
    let mut nested = config("deepseek_v4_1_flash");
    nested["hidden_size"] = json!(1);
    nested["index_topk"] = json!(1);
    nested["text_config"]["hidden_size"] = json!(2);
    nested["quantization_config"] = json!({"quant_method": "fp8"});
    let fields = Plan::hf_fields(&serde_json::to_vec(&nested).unwrap()).unwrap();
    assert_eq!((&fields["hidden_size"], &fields["index_topk"]), (&json!(2), &json!(512)));
    assert_eq!(fields["quantization_config"], nested["quantization_config"]);
}

#[test]
fn every_spelling_of_glm_5_2_is_one_plan() {
    let types = config("glm_5_2")["indexer_types"].clone();
    let letters: Vec<String> = GLM52.chars().map(String::from).collect();
    let full: Vec<usize> = (0..78).filter(|l| GLM52.as_bytes()[*l] == b'F').collect();
    let none =
        json!({"indexer_types": null, "index_topk_freq": null, "index_skip_topk_offset": null});
    let cases = [
        (json!({"indexer_types": types}), "indexer_types", None),
        (json!({"index_topk_pattern": GLM52}), "index_topk_pattern", None),
        (json!({"index_topk_pattern": letters}), "index_topk_pattern", None),
        (json!({"index_topk_pattern": types}), "index_topk_pattern", None),
        (json!({"index_topk_pattern": full}), "index_topk_pattern", None),
        (json!({"index_source_layer_ids": full}), "index_source_layer_ids", None),
        (
            json!({"index_topk_freq": 4, "index_skip_topk_offset": 3}),
            "index_topk_freq",
            Some(Dialect::Hf),
        ),
    ];
    let expected = read(&config("glm_5_2")).unwrap().fingerprint();
    for (fields, name, dialect) in cases {
        let mut config = with("glm_5_2", none.clone());
        for (key, value) in fields.as_object().unwrap() {
            config[key] = value.clone();
        }
        let plan = read(&config).unwrap();
        assert_eq!(plan.letters(), GLM52);
        assert_eq!(field(&plan), (name, dialect));
        assert_eq!(plan.fingerprint(), expected, "{fields}");
    }
}

#[test]
fn fields_that_agree_are_noted() {
    let plan = read(&with("glm_5_2", json!({"index_topk_pattern": GLM52}))).unwrap();
    assert_eq!(plan.origin().field, Field::IndexerTypes);
    assert_eq!(
        plan.notes(),
        [
            "index_topk_pattern says the same as indexer_types, which decides",
            "index_topk_freq says the same as indexer_types, which decides",
        ]
    );
}

#[test]
fn fields_that_disagree_are_refused() {
    refused(
        &with("glm_5_2", json!({"index_skip_topk_offset": 2})),
        "indexer_types and index_topk_freq disagree, first at layer 2 (full against shared); remove or correct one",
    );
    let half = "FS".repeat(39);
    refused(
        &with("glm_5_2", json!({"index_topk_pattern": half})),
        "indexer_types and index_topk_pattern disagree, first at layer 1 (full against shared); remove or correct one",
    );
    refused(
        &with("glm_5_1", json!({"index_topk_pattern": half, "index_topk_freq": 4})),
        "index_topk_pattern and index_topk_freq disagree, first at layer 1 (shared against full); remove or correct one",
    );
    // Read by another rule, the same numbers do not agree any more.
    let atom = HfOptions { dialect: Some(Dialect::Atom), ..Default::default() };
    assert_eq!(
        read_with(&config("glm_5_2"), &atom).unwrap_err().message,
        "indexer_types and index_topk_freq disagree, first at layer 3 (shared against full); remove or correct one",
    );
}

/// Tools write `index_topk_freq: 1`, the default, beside the field that decides.
#[test]
fn a_frequency_of_1_is_no_opinion() {
    let plan =
        read(&with("hy4_preview", json!({"index_topk_freq": 1, "index_skip_topk_offset": 2})));
    let plan = plan.unwrap();
    assert_eq!(plan.count(Role::Full), 21);
    assert_eq!(
        plan.notes(),
        ["index_topk_freq is 1; servers that do not read indexer_types would run every layer Full"]
    );
}

#[test]
fn a_lossy_paste_is_refused() {
    let paste = &GLM52[..75];
    refused(
        &with("glm_5_1", json!({"index_topk_pattern": paste})),
        "index_topk_pattern has 75 entries but the model has 78 layers: give 78 entries; nothing is filled in, because entries lost on the way shift every layer after the gap",
    );
    refused(
        &with("hy4_preview", json!({"indexer_types": vec!["full"; 79]})),
        "indexer_types has 79 entries but the model has 78 layers: give 78 entries; nothing is cut off, because one entry too many shifts every layer after it (draft layers are always Full and not listed)",
    );
}

#[test]
fn one_rule_says_where_another_differs() {
    let plan = read(&with("glm_5_2", json!({"indexer_types": null}))).unwrap();
    assert_eq!(
        plan.notes(),
        [
            "index_topk_freq is read in the hf rule; the atom rule differs from layer 3 on, so an index_topk_pattern or indexer_types is safer"
        ]
    );
    // Without an offset the two rules agree.
    let plan = read(&with("glm_5_1", json!({"index_topk_freq": 4}))).unwrap();
    assert!(plan.letters().starts_with("FFSSSFSSSF"));
    assert!(plan.notes().is_empty());
}

#[test]
fn deepseek_v4_counts_its_indexers() {
    let short = "FSFSFSFSFSFSFSFSFSFSF";
    let long = "--F-S-F-S-F-S-F-S-F-S-F-S-F-S-F-S-F-S-F-S-F";
    let v4 = |fields| with("deepseek_v4_flash", fields);
    for letters in [short, long, &long.replace('-', "F"), &long.replace('-', "S")] {
        let plan = read(&v4(json!({"index_topk_pattern": letters, "use_index_cache": true})));
        assert_eq!(plan.unwrap().letters(), long);
    }
    let freq = json!({"index_topk_freq": 2, "use_index_cache": true});
    let plan = read(&v4(freq.clone())).unwrap();
    assert_eq!(plan.letters(), "--F-F-S-F-S-F-S-F-S-F-S-F-S-F-S-F-S-F-S-F-S");
    assert_eq!(field(&plan), ("index_topk_freq", Some(Dialect::V4)));
    assert_eq!(
        plan.notes(),
        [
            "index_topk_freq is read in the v4 rule; the v4-atom rule differs from layer 4 on, so an index_topk_pattern or indexer_types is safer"
        ]
    );
    let atom = HfOptions { dialect: Some(Dialect::V4Atom), ..Default::default() };
    assert_eq!(read_with(&v4(freq), &atom).unwrap().letters(), long);
    refused(
        &v4(json!({"index_topk_pattern": "F".repeat(22)})),
        "index_topk_pattern has 22 entries but the model has 43 layers, 21 of them with an indexer: give 43 entries, or 21 for those alone; nothing is filled in, because entries lost on the way shift every layer after the gap",
    );
}

#[test]
fn deepseek_v4_1_shares_index_k_as_well() {
    let plan = read(&config("deepseek_v4_1_flash")).unwrap();
    assert_eq!(plan.index_k_layers(), [2, 8, 14, 20]);
    let facts = |l| {
        let layer = plan.layer(l).unwrap();
        (layer.role, layer.source, layer.index_k_owner, layer.index_k_slot, layer.block)
    };
    assert_eq!(facts(0), (Role::None, None, None, None, 1));
    assert_eq!(facts(14), (Role::Full, Some(14), Some(14), Some(2), 2));
    assert_eq!(facts(19), (Role::Shared, Some(14), None, None, 2));
    // Runs an indexer, over index K that layer 20 wrote.
    assert_eq!(facts(24), (Role::Full, Some(24), Some(20), Some(3), 1));
    assert!(!plan.layer(24).unwrap().owns_index_k(24));
    // A stage that starts there needs that index K from the stage before.
    let stage = plan.slice(24, 43, false).unwrap();
    assert_eq!((stage.receive(), stage.index_k_layers()), (None, &[20][..]));
    assert_eq!(stage.index_k_slot(36).unwrap(), Some(0));

    let v41 = |fields| with("deepseek_v4_1_flash", fields);
    refused(
        &v41(json!({"index_source_layer_ids": [2, 8, 14, 24, 28, 32, 36]})),
        "compress_ratios: layer 20 has ratio 1 but would use indices of layer 14, which has ratio 2; make layer 20 a source of its own",
    );
    refused(
        &v41(json!({"kv_source_layer_ids": [2, 8, 14]})),
        "compress_ratios: layer 20 has ratio 1 but would use index K of layer 14, which has ratio 2; make layer 20 a source of its own",
    );
    refused(
        &v41(json!({"kv_source_layer_ids": [8, 14, 20]})),
        "kv_source_layer_ids: layer 2 runs an indexer, but no layer up to it publishes index K",
    );
    refused(
        &v41(json!({"kv_source_layer_ids": null})),
        "text_config.kv_source_layer_ids is missing: it says which layers publish the index K that the others read",
    );
    refused(
        &v41(json!({"kv_source_layer_ids": [2, 14, 8, 20]})),
        "text_config.kv_source_layer_ids: layer 8 comes after layer 14; list each layer once, in ascending order",
    );
    refused(
        &v41(json!({"kv_source_layer_ids": [2, 40]})),
        "text_config.kv_source_layer_ids: layer 40 is outside 0..=39",
    );
    refused(
        &v41(json!({"index_source_layer_ids": [0, 2, 8]})),
        "index_source_layer_ids: layer 0 has no sparse attention, so it cannot be a source",
    );
    refused(
        &v41(json!({"compress_ratios": [0, 0, 2]})),
        "text_config.compress_ratios has 3 entries but the model has 40 layers and 3 draft layers: give 40 or 43",
    );
}

#[test]
fn minimax_m3_counts_sparse_layers_and_reads_the_text_config() {
    let on = json!({"use_index_cache": true, "index_topk_freq": 4});
    let plan = read(&with("minimax_m3", on)).unwrap();
    let expected = "---FSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSF";
    assert_eq!(plan.letters(), expected);
    assert_eq!(field(&plan), ("index_topk_freq", Some(Dialect::M3)));
    assert!(plan.notes().is_empty() && plan.inactive().is_none());
    let short: String = expected[3..].into();
    let plan = read(&with("minimax_m3", json!({"index_topk_pattern": short}))).unwrap();
    assert_eq!(plan.letters(), expected);
    assert_eq!(
        plan.notes(),
        [
            "some servers act on index_topk_pattern of this model only with use_index_cache: true, which the config does not say"
        ]
    );
    refused(
        &with("minimax_m3", json!({"sparse_attention_config": null})),
        "text_config.sparse_attention_config is missing: without it servers run this model dense, so there is nothing to plan",
    );
    let mut dense = config("minimax_m3");
    dense["text_config"]["sparse_attention_config"]["use_sparse_attention"] = json!(false);
    refused(
        &dense,
        "text_config.sparse_attention_config.use_sparse_attention is false: no layer has an indexer, so there is nothing to plan",
    );
    let mut dense = config("minimax_m3");
    dense["text_config"]["sparse_attention_config"]["sparse_attention_freq"] = json!(null);
    refused(
        &dense,
        "text_config.sparse_attention_config.sparse_attention_freq is missing: without it servers run this model dense, so there is nothing to plan",
    );
    let mut blocks = config("minimax_m3");
    blocks["text_config"]["sparse_attention_config"]["sparse_topk_blocks"] = json!(null);
    refused(
        &blocks,
        "text_config.sparse_attention_config.sparse_topk_blocks is missing: give the number of blocks that are selected",
    );
}

/// A flat override on a nested config, or the other way round, is silently ignored by servers.
#[test]
fn reuse_in_the_wrong_place_is_refused() {
    let mut flat = config("minimax_m3");
    flat["index_topk_freq"] = json!(4);
    let nested = "because the model's own fields are inside text_config; move it there";
    refused(&flat, &format!("index_topk_freq would be ignored, {nested}"));
    flat["index_topk_freq"] = json!(1);
    flat["use_index_cache"] = json!(true);
    refused(&flat, &format!("use_index_cache would be ignored, {nested}"));
    let mut deep = config("minimax_m3");
    deep["text_config"]["sparse_attention_config"]["index_topk_pattern"] = json!("F");
    refused(
        &deep,
        &format!(
            "text_config.sparse_attention_config.index_topk_pattern would be ignored, {nested}"
        ),
    );

    let top = "because the model's own fields are at the top level; move it there";
    let mut wrapped = config("glm_5_1");
    wrapped["text_config"] = json!({"index_topk_freq": 4});
    refused(&wrapped, &format!("text_config.index_topk_freq would be ignored, {top}"));
    let mut wrapped = config("glm_5_1");
    wrapped["hf_overrides"] = json!({"text_config": {"indexer_types": ["full"]}});
    refused(&wrapped, &format!("hf_overrides.text_config.indexer_types would be ignored, {top}"));

    let mut offset = with("minimax_m3", json!({"index_topk_freq": 4}));
    offset["index_skip_topk_offset"] = json!(3);
    refused(&offset, &format!("index_skip_topk_offset would be ignored, {nested}"));
    let mut draft = config("minimax_m3");
    draft["index_share_for_mtp_iteration"] = json!(true);
    refused(&draft, &format!("index_share_for_mtp_iteration would be ignored, {nested}"));
    // The flat switch does not switch the nested frequency off.
    let mut off = with("minimax_m3", json!({"index_topk_freq": 4, "use_index_cache": true}));
    off["use_index_cache"] = json!(false);
    refused(&off, &format!("use_index_cache would be ignored, {nested}"));

    // Harmless: the same again, defaults, nulls, and another model's config.
    let mut same = with("minimax_m3", json!({"index_topk_freq": 4, "use_index_cache": true}));
    same["index_topk_freq"] = json!(4);
    same["use_index_cache"] = json!(true);
    same["index_topk_pattern"] = json!(null);
    same["indexer_types"] = json!(null);
    same["draft_config"] = json!({"num_hidden_layers": 1, "index_topk_freq": 2});
    assert_eq!(read(&same).unwrap().count(Role::Full), 15);
    let mut off = config("minimax_m3");
    off["index_topk_freq"] = json!(1);
    off["use_index_cache"] = json!(false);
    assert!(read(&off).is_ok());
}

#[test]
fn configured_but_inactive_is_visible() {
    let inactive = |model, fields| {
        let plan = read(&with(model, fields)).unwrap();
        assert_eq!(plan.count(Role::Shared), 0);
        let noted = plan.notes().first().and_then(|n| n.strip_prefix("configured but inactive: "));
        assert_eq!(plan.inactive(), noted);
        plan.inactive().map(String::from)
    };
    let off = inactive("glm_5_1", json!({"index_topk_freq": 4, "use_index_cache": false}));
    assert_eq!(off.unwrap(), "index_topk_freq asks for reuse, but use_index_cache is false");
    let off = inactive("glm_5_1", json!({"index_topk_pattern": GLM52, "use_index_cache": false}));
    assert_eq!(off.unwrap(), "index_topk_pattern asks for reuse, but use_index_cache is false");
    let none = inactive("deepseek_v32", json!({"use_index_cache": true}));
    assert_eq!(none.unwrap(), "use_index_cache is true, but no field says which layers are Shared");
    let far = inactive("glm_5_1", json!({"index_topk_freq": 4, "index_skip_topk_offset": 90}));
    assert_eq!(far.unwrap(), "index_topk_freq leaves every layer Full");
    assert_eq!(inactive("glm_5_1", json!({"use_index_cache": false})), None);

    // Shared layers of such a checkpoint have no indexer: nothing can switch them to Full.
    let plan = read(&with("glm_5_2", json!({"use_index_cache": false}))).unwrap();
    assert_eq!((plan.letters().as_str(), plan.inactive()), (GLM52, None));
    assert!(plan.notes().iter().any(|n| n
        == "use_index_cache is false, but indexer_types is how the checkpoint was made: its Shared layers have no indexer to run"));
}

#[test]
fn glm_5_3_flash_has_an_indexer_on_some_layers() {
    let flash = |fields| with("glm_5_3_flash", fields);
    let full: Vec<usize> = (0..45).filter(|l| l % 4 == 3).collect();
    let by_list = flash(json!({
        "layer_types": null, "linear_attn_config": {"full_attn_layers": full},
    }));
    let expected = read(&config("glm_5_3_flash")).unwrap();
    assert_eq!(read(&by_list).unwrap().fingerprint(), expected.fingerprint());
    let short = "FSSSFSSSFSS";
    let plan = flash(json!({"indexer_types": null, "index_topk_pattern": short}));
    assert_eq!(read(&plan).unwrap().letters(), "---F---S---S---S---F---S---S---S---F---S---S-");
    refused(
        &flash(json!({"layer_types": null})),
        "text_config.layer_types is missing: it says which layers attend sparsely and which linearly",
    );
    refused(
        &flash(json!({"layer_types": null, "linear_attn_config": {"full_attn_layers": [3, 45]}})),
        "text_config.linear_attn_config.full_attn_layers: layer 45 is outside 0..=44",
    );
    refused(
        &flash(json!({"indexer_types": null, "index_topk_freq": 4})),
        "index_topk_freq: layer 3 is Shared before any layer is Full; make layer 3, the first with sparse attention, Full",
    );
    let plan = read(&flash(json!({"index_kpool_compress": false}))).unwrap();
    let plain = json!({"index_kpool": null, "index_kpool_always_select_tail": null});
    assert_eq!(plan.fingerprint(), read(&flash(plain)).unwrap().fingerprint());
    assert_eq!(plan.row_bytes(), 8192);
    assert_eq!(
        plan.notes(),
        ["index_kpool is 4, but index_kpool_compress is false: keys are not pooled"]
    );
    refused(
        &flash(json!({"index_topk": 2047})),
        "index_topk (2047) must be a multiple of index_kpool (4)",
    );
    refused(&flash(json!({"index_kpool": 0})), "index_kpool must be from 1 to 4096, got 0");
}

#[test]
fn unknown_models_are_read_by_the_general_rule_or_refused() {
    let some = json!({
        "model_type": "somebody_s_dsa", "num_hidden_layers": 6, "index_topk": 64, "index_topk_freq": 2,
    });
    let plan = read(&some).unwrap();
    assert_eq!((plan.letters().as_str(), plan.model().index_head_dim), ("FFSFSF", 128));
    assert_eq!(
        plan.notes(),
        [
            "model_type somebody_s_dsa is not known: read as DeepSeek Sparse Attention, in the hf rule",
            "index_head_dim is not given and taken to be 128",
        ]
    );
    refused(
        &json!({"model_type": "llama", "num_hidden_layers": 32}),
        "model_type llama is not known and the config has no index_topk, so this is not a model with sparse attention that can be planned",
    );
    refused(
        &json!({"num_hidden_layers": 32}),
        "model_type (none) is not known and the config has no index_topk, so this is not a model with sparse attention that can be planned",
    );
    refused(
        &json!({"model_type": "v5", "num_hidden_layers": 3, "index_topk": 8, "compress_ratios": [0, 4, 4]}),
        "model_type v5 is not known, and compress_ratios says that its layers differ; give the pattern yourself, with - for layers without an indexer",
    );
}

#[test]
fn wrong_types_and_values_are_refused() {
    let entries = "has 2 entries but the model has 78 layers: give 78 entries; nothing is filled in, because entries lost on the way shift every layer after the gap";
    #[rustfmt::skip]
    let table = [
        (json!({"num_hidden_layers": null}), "num_hidden_layers is missing: give the number of decoder layers"),
        (json!({"num_hidden_layers": 0}), "num_hidden_layers must be from 1 to 4096, got 0"),
        (json!({"num_hidden_layers": 4097}), "num_hidden_layers must be from 1 to 4096, got 4097"),
        (json!({"num_hidden_layers": -1}), "num_hidden_layers must be from 0 to 1048576, got -1"),
        (json!({"num_hidden_layers": 78.0}), "num_hidden_layers must be an integer, got 78.0"),
        (json!({"num_hidden_layers": "78"}), "num_hidden_layers must be an integer, got \"78\""),
        (json!({"num_nextn_predict_layers": 4096}), "78 layers and 4096 draft layers are more than 4096"),
        (json!({"model_type": 5}), "model_type must be a string, got 5"),
        (json!({"index_topk": null}), "index_topk is missing: give the number of positions that the indexer selects"),
        (json!({"index_topk": 0}), "index_topk must be from 1 to 4096, got 0"),
        (json!({"index_topk": 4097}), "index_topk must be from 1 to 4096, got 4097"),
        (json!({"index_topk": -5}), "index_topk must be from 0 to 1048576, got -5"),
        (json!({"index_head_dim": 0}), "index_head_dim must be from 1 to 4096, got 0"),
        (json!({"index_topk_freq": 0}), "index_topk_freq must be 1 or more (1 makes every layer Full), got 0"),
        (json!({"index_topk_freq": -4}), "index_topk_freq must be 1 or more (1 makes every layer Full), got -4"),
        (json!({"index_topk_freq": 4.0}), "index_topk_freq must be an integer, got 4.0"),
        (json!({"index_topk_freq": true}), "index_topk_freq must be an integer, got true"),
        (json!({"index_topk_freq": u64::MAX}), "index_topk_freq must be an integer, got 18446744073709551615"),
        (json!({"index_topk_freq": 4, "index_skip_topk_offset": 0}), "index_skip_topk_offset must be 1 or more in the hf rule, got 0"),
        (json!({"index_topk_freq": 4, "index_skip_topk_offset": "3"}), "index_skip_topk_offset must be an integer, got \"3\""),
        (json!({"indexer_types": "full"}), "indexer_types must be a list, got \"full\""),
        (json!({"indexer_types": ["full", 1]}), "indexer_types: entry 1 must be a string, got 1"),
        (json!({"indexer_types": ["full", "F"]}), "indexer_types: entry 1 is \"F\", expected \"full\" or \"shared\""),
        (json!({"indexer_types": ["full", "full"]}), &format!("indexer_types {entries}")),
        (json!({"index_topk_pattern": {}}), "index_topk_pattern must be a string of F and S, or a list, got an object"),
        (json!({"index_topk_pattern": 4}), "index_topk_pattern must be a string of F and S, or a list, got 4"),
        (json!({"index_topk_pattern": ["F", 1]}), "index_topk_pattern: entry 1 must be a string, got 1"),
        (json!({"index_topk_pattern": [0, "S"]}), "index_topk_pattern: entry 1 must be an integer, got \"S\""),
        (json!({"index_topk_pattern": [0, 4, 4]}), "index_topk_pattern: layer 4 is listed twice"),
        (json!({"index_topk_pattern": [0, 78]}), "index_topk_pattern: layer 78 is outside 0..=77"),
        (json!({"index_topk_pattern": "FS"}), &format!("index_topk_pattern {entries}")),
        (json!({"index_topk_pattern": GLM52.to_lowercase()}), "index_topk_pattern: 'f' at position 0 is lower case; write F"),
        (json!({"index_source_layer_ids": [1.5]}), "index_source_layer_ids: entry 0 must be an integer, got 1.5"),
        (json!({"index_source_layer_ids": []}), "index_source_layer_ids is empty: at least the first layer must be listed"),
        (json!({"use_index_cache": "yes"}), "use_index_cache must be true or false, got \"yes\""),
        (json!({"index_share_for_mtp_iteration": 1}), "index_share_for_mtp_iteration must be true or false, got 1"),
        (json!({"layer_types": ["deepseek_sparse_attention"]}),
            "layer_types has 1 entries but the model has 78 layers and 1 draft layers: give 78 or 79"),
    ];
    for (fields, message) in table {
        refused(&with("glm_5_1", fields), message);
    }
    refused(
        &with("deepseek_v4_flash", json!({"compress_ratios": null})),
        "compress_ratios is missing: it says which layers have an indexer",
    );
    let mut ratios = config("deepseek_v4_flash")["compress_ratios"].clone();
    ratios[7] = json!(-4);
    refused(
        &with("deepseek_v4_flash", json!({"compress_ratios": ratios})),
        "compress_ratios: entry 7 must be 0 or more, got -4",
    );
    for (bytes, message) in [
        (&b"[]"[..], "the config is not a JSON object"),
        (b"", "the config is not valid JSON: EOF while parsing a value at line 1 column 0"),
        (b"{\"a\": NaN}", "the config is not valid JSON: expected value at line 1 column 7"),
        (b"\xff", "the config is not valid JSON: expected value at line 1 column 1"),
    ] {
        assert_eq!(Plan::from_hf_config(bytes).unwrap_err().message, message);
    }
}

#[test]
fn a_caller_may_overrule_a_config() {
    let half = "FS".repeat(39);
    let by =
        |letters| HfOptions { pattern: Some(Spelling::Letters(letters)), ..Default::default() };
    let plan = read_with(&config("glm_5_2"), &by(&half)).unwrap();
    assert_eq!((plan.letters(), field(&plan)), (half.clone(), ("argument", None)));
    assert_eq!(
        plan.notes(),
        ["the argument overrules indexer_types, which differs from layer 1 on"]
    );
    // Even where the config's own fields are not acceptable; the model's layers still count.
    let broken = with("glm_5_1", json!({"index_topk_freq": 0}));
    let plan = read_with(&broken, &by(&half)).unwrap();
    assert_eq!(
        plan.notes(),
        [
            "overruled, and not acceptable: index_topk_freq must be 1 or more (1 makes every layer Full), got 0"
        ]
    );
    assert!(read_with(&broken, &by("FS")).unwrap_err().message.contains("has 2 entries"));
    let topk = HfOptions { topk: Some(512), ..Default::default() };
    let plan = read_with(&with("glm_5_2", json!({"index_topk": null})), &topk).unwrap();
    assert_eq!(plan.model().topk, 512);
    let atom = HfOptions { dialect: Some(Dialect::Atom), ..Default::default() };
    let plan = read_with(&config("deepseek_v32"), &atom).unwrap();
    assert_eq!(plan.notes(), ["the atom rule was asked for, but there is no frequency to read"]);
}

#[test]
fn fields_that_look_like_ours_are_noted() {
    let plan = read(&with(
        "glm_5_1",
        json!({"index_cache_freq": 4, "index_topk_min_seq_len": 4096, "index_share_every": null}),
    ));
    assert_eq!(
        plan.unwrap().notes(),
        [
            "index_cache_freq is not read",
            "index_topk_min_seq_len is not read: a plan holds at every length",
        ]
    );
}

#[test]
fn plans_are_exported_in_every_spelling() {
    let plan = read(&config("glm_5_2")).unwrap();
    let pattern = plan.pattern().unwrap();
    assert_eq!(pattern.to_string(), GLM52);
    assert_eq!(json!(pattern.indexer_types()), config("glm_5_2")["indexer_types"]);
    assert_eq!(pattern.source_layers()[..5], [0, 1, 2, 6, 10]);
    let rule = Dialect::Hf.express(&pattern).unwrap();
    assert_eq!((rule.freq, rule.offset), (4, 3));
    let rule = Dialect::Atom.express(&pattern).unwrap();
    assert_eq!((rule.freq, rule.offset), (4, 2));
    assert_eq!(
        Dialect::V4.express(&pattern).unwrap_err().message,
        "no index_topk_freq means this pattern in the v4 dialect; export it as letters or indexer_types"
    );
    assert_eq!(
        plan.slice(3, 9, false).unwrap().pattern().unwrap_err().message,
        "layers 3..9 are a stage, not a whole pattern; export the plan that it was cut from"
    );
    let v4 = read(&config("deepseek_v4_flash")).unwrap().pattern().unwrap();
    assert_eq!(v4.compact(), "F".repeat(21));
}

/// Whatever was read, in every spelling, reads back as the same plan.
fn check_round_trip(config: &Value, plan: &Plan) {
    let pattern = plan.pattern().unwrap();
    let (letters, compact) = (pattern.to_string(), pattern.compact());
    let types = pattern.indexer_types();
    let sources: Vec<i64> = pattern.source_layers().into_iter().map(i64::from).collect();
    let mut spellings = vec![
        Spelling::Letters(&letters),
        Spelling::Letters(&compact),
        Spelling::IndexerTypes(&types),
        Spelling::SourceLayers(&sources),
        Spelling::AllowList(&sources),
    ];
    for dialect in Dialect::ALL {
        if let Ok(rule) = dialect.express(&pattern) {
            spellings.push(Spelling::Freq { freq: rule.freq, offset: Some(rule.offset), dialect });
        }
    }
    for spelling in spellings {
        let options = HfOptions { pattern: Some(spelling), ..Default::default() };
        let again = read_with(config, &options).unwrap();
        assert_eq!(again.fingerprint(), plan.fingerprint(), "{spelling:?}");
    }
}

#[test]
fn published_models_round_trip() {
    for model in MODELS {
        let config = config(model);
        check_round_trip(&config, &read(&config).unwrap());
    }
}

#[test]
fn json_has_the_promised_keys() {
    let plan = read(&config("glm_5_2")).unwrap();
    let json: Value = serde_json::from_str(&plan.to_json().unwrap()).unwrap();
    assert_eq!(json["pattern"], GLM52);
    assert_eq!(json["source"], "indexer_types");
    assert_eq!(json["dialect"], Value::Null);
    assert_eq!(json["inactive"], Value::Null);
    assert_eq!(
        (&json["layers"], &json["full"], &json["shared"]),
        (&json!(78), &json!(21), &json!(57))
    );
    assert_eq!((&json["mtp_layers"], &json["topk"]), (&json!(1), &json!(2048)));
    assert_eq!(json["index_k_bytes_per_token"], json!(2904));
    assert_eq!(json["index_k_bytes_saved_per_token"], json!(7524));
    assert_eq!(json["fingerprint"], format!("{:016x}", plan.fingerprint()));
    assert_eq!(json["layer"].as_array().unwrap().len(), 79);
    assert_eq!(json["layer"][9]["role"], "shared");
    assert_eq!(json["layer"][9]["source"], 6);
    assert_eq!(json["layer"][9]["index_k_slot"], Value::Null);
    assert_eq!(json["layer"][78]["draft"], true);
    assert_eq!(json["stage"]["receive_from_layer"], Value::Null);
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        (-3i64..100).prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        "[FSfs-]{0,80}".prop_map(Value::from),
        ".{0,12}".prop_map(Value::from),
        Just(Value::from("full")),
        Just(Value::from("shared")),
        Just(Value::from("deepseek_sparse_attention")),
    ];
    leaf.prop_recursive(2, 60, 50, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..80).prop_map(Value::from),
            (any_key(), inner).prop_map(|(k, v)| json!({ k: v })),
        ]
    })
}

fn any_key() -> impl Strategy<Value = &'static str> {
    prop::sample::select(vec![
        "model_type",
        "text_config",
        "num_hidden_layers",
        "num_nextn_predict_layers",
        "index_topk",
        "index_head_dim",
        "index_topk_pattern",
        "index_topk_freq",
        "index_skip_topk_offset",
        "indexer_types",
        "index_source_layer_ids",
        "kv_source_layer_ids",
        "compress_ratios",
        "layer_types",
        "linear_attn_config",
        "full_attn_layers",
        "sparse_attention_config",
        "sparse_attention_freq",
        "sparse_topk_blocks",
        "sparse_block_size",
        "num_key_value_heads",
        "index_kpool",
        "index_kpool_always_select_tail",
        "use_index_cache",
    ])
}

/// Nothing that is accepted may trip over itself later.
fn exercise(plan: &Plan) {
    plan.to_json().unwrap();
    let last = plan.total_layers();
    for promote in [false, true] {
        let (a, b) = (plan.slice(0, 1, promote), plan.slice(last - 1, last, promote));
        a.unwrap().to_json().unwrap();
        b.unwrap().to_json().unwrap();
    }
    assert!(plan.layer(last).is_err() && plan.slice(0, last + 1, false).is_err());
    for layer in 0..last {
        let facts = plan.layer(layer).unwrap();
        assert_eq!(facts.source.is_some(), facts.role != Role::None);
        assert_eq!(facts.index_k_slot.is_some(), facts.role == Role::Full);
    }
    assert!(plan.index_k_bytes_saved_per_token() >= 0.0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn any_fields_are_read_or_refused(
        model in prop::sample::select(MODELS.to_vec()),
        changes in prop::collection::vec((any_key(), any_json(), any::<bool>()), 1..4),
    ) {
        let mut config = config(model);
        for (key, value, nested) in changes {
            let node = if nested { home(&mut config) } else { &mut config };
            if node.is_object() {
                node[key] = value;
            }
        }
        if let Ok(plan) = read(&config) {
            exercise(&plan);
        }
    }

    #[test]
    fn any_bytes_are_read_or_refused(
        model in prop::sample::select(MODELS.to_vec()),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        cut in any::<prop::sample::Index>(),
        whole: bool,
    ) {
        let mut bytes = serde_json::to_vec(&config(model)).unwrap();
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        let end = if whole { bytes.len() } else { cut.index(bytes.len()) };
        if let Ok(plan) = Plan::from_hf_config(&bytes[..end]) {
            exercise(&plan);
        }
    }

    #[test]
    fn any_pattern_round_trips(letters in "F[FS]{42}") {
        let config = with("deepseek_v4_flash", json!({"num_nextn_predict_layers": 0}));
        let short: String = letters.chars().take(21).collect();
        let options = HfOptions { pattern: Some(Spelling::Letters(&short)), ..Default::default() };
        check_round_trip(&config, &read_with(&config, &options).unwrap());
    }
}
