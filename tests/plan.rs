//! Plans against published patterns and hand-written tables.

#![allow(clippy::unwrap_used)]

use indexcache::error::{Error, Status};
use indexcache::plan::{Dialect, Handoff, Indexers, Model, Pattern, Plan, Role, Spelling};
use proptest::prelude::*;

/// Patterns published with the method: name, letters, Full layers.
const PUBLISHED: [(&str, &str, usize); 5] = [
    ("30B 1/2", "FSFSFSSSSFSFFFFSFFSSFFSFFFSSFFSSFSSSSFSFFFSFSSF", 24),
    ("30B 1/4", "FSFSFSSSSFSSSFSSFFSSFSSFSSSSFSSSFSSSSFSSSSSSSSS", 12),
    ("30B 1/8", "FSSSFSSSSSSSSFSSSFSSSSSFSSSSFSSSSSSSSFSSSSSSSSS", 7),
    (
        "GLM-5 1/2",
        "FFSFSSSFSSFFFSSSFFFSFSSSSSSFFSFFSFFSSFFFFFFSFFFFFSFFSSSSSSFSFFFSFSSSFSFFSFFSSS",
        40,
    ),
    (
        "GLM-5 1/4",
        "FFSFSSSFSSFSFSSSSSSSFSSSSSSFSSSFSFSSSSFFFFFSSSFFSSSFSSSSSSSSFSSSFSSSSSSFSFSSSS",
        22,
    ),
];

/// GLM-5.2: Full at 0, 1, 2, 6, 10, …, 74.
const GLM52: &str =
    "FFFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSS";

fn plan(letters: &str) -> Plan {
    Plan::new(letters.parse().unwrap(), Model::new(2048)).unwrap()
}

fn read(spelling: Spelling<'_>, layers: u64) -> Result<String, Error> {
    Pattern::new(&spelling, &Indexers::any(layers)?).map(|p| p.to_string())
}

fn freq(freq: i64, offset: Option<i64>, dialect: Dialect, layers: u64) -> Result<String, Error> {
    read(Spelling::Freq { freq, offset, dialect }, layers)
}

/// Layers 2, 4, 6, … of `layers` have an indexer, as in DeepSeek-V4-Flash.
fn even_from_two(layers: usize) -> Indexers {
    Indexers::exactly((0..layers).map(|l| l >= 2 && l % 2 == 0).collect()).unwrap()
}

#[track_caller]
fn refused<T: std::fmt::Debug>(result: Result<T, Error>, message: &str) {
    let error = result.unwrap_err();
    assert_eq!(error.status, Status::Config);
    assert_eq!(error.message, message);
}

#[test]
fn published_patterns_have_their_counts_and_round_trip() {
    for (name, letters, full) in PUBLISHED {
        let plan = plan(letters);
        assert_eq!(plan.count(Role::Full) as usize, full, "{name}");
        assert_eq!(plan.count(Role::Shared) as usize, letters.len() - full, "{name}");
        assert_eq!(letters.parse::<Pattern>().unwrap().to_string(), letters, "{name}");
    }
}

#[test]
fn published_patterns_are_nested() {
    for (outer, inner) in [(0, 1), (1, 2), (3, 4)] {
        let pairs = PUBLISHED[outer].1.chars().zip(PUBLISHED[inner].1.chars());
        assert!(pairs.into_iter().all(|(o, i)| i == 'S' || o == 'F'));
    }
}

#[test]
fn glm_5_2_is_full_at_0_1_2_6_to_74() {
    assert_eq!(freq(4, Some(3), Dialect::Hf, 78).unwrap(), GLM52);
    let plan = plan(GLM52);
    let full: Vec<u32> = (0..78).filter(|l| plan.role(*l).unwrap() == Role::Full).collect();
    let expected = [0, 1, 2, 6, 10, 14, 18, 22, 26, 30, 34, 38, 42, 46, 50, 54, 58, 62, 66, 70, 74];
    assert_eq!(full, expected);
    assert_eq!(plan.index_k_layers(), expected);
    assert_eq!(plan.index_k_bytes_per_token(), 21.0 * 132.0);
    assert_eq!(plan.index_k_bytes_saved_per_token(), 57.0 * 132.0);
    assert_eq!(plan.index_k_slot(74).unwrap(), Some(20));
    assert_eq!(plan.index_k_slot(75).unwrap(), None);
    assert_eq!(plan.source(73).unwrap(), Some(70));
}

/// Each rule written out by hand from its own definition, 13 layers.
#[test]
fn every_dialect_against_a_table() {
    use Dialect::*;
    let table = [
        (Hf, 1, None, "FFFFFFFFFFFFF"),
        (Hf, 2, None, "FFSFSFSFSFSFS"),
        (Hf, 4, None, "FFSSSFSSSFSSS"),
        (Hf, 4, Some(1), "FSSSFSSSFSSSF"),
        (Hf, 4, Some(3), "FFFSSSFSSSFSS"),
        (Hf, 3, Some(5), "FFFFFSSFSSFSS"),
        (Atom, 4, None, "FFSSSFSSSFSSS"),
        (Atom, 4, Some(0), "FSSSFSSSFSSSF"),
        (Atom, 4, Some(3), "FFFFSSSFSSSFS"),
        (Xllm, 4, None, "FSSSFSSSFSSSF"),
        (Xllm, 4, Some(3), "FFFFSSSFSSSFS"),
        (Megatron, 4, Some(1), "FSSSFSSSFSSSF"),
        (Megatron, 4, Some(3), "FFFSSSFSSSFSS"),
        (V4, 2, None, "FFSFSFSFSFSFS"),
        (V4, 4, None, "FFSSSFSSSFSSS"),
        (V4Atom, 2, None, "FSFSFSFSFSFSF"),
        (V4Atom, 4, None, "FSSSFSSSFSSSF"),
        (M3, 4, None, "FSSSFSSSFSSSF"),
        (M3, 4, Some(2), "FFFSSSFSSSFSS"),
    ];
    for (dialect, f, offset, expected) in table {
        assert_eq!(freq(f, offset, dialect, 13).unwrap(), expected, "{dialect} {f} {offset:?}");
    }
}

/// The ordinal rules count the layers that have an indexer; the others count all layers.
#[test]
fn dialects_where_only_some_layers_have_an_indexer() {
    let at = even_from_two(13);
    let read = |dialect, f| {
        Pattern::new(&Spelling::Freq { freq: f, offset: None, dialect }, &at).map(|p| p.to_string())
    };
    assert_eq!(read(Dialect::V4, 2).unwrap(), "--F-F-S-F-S-F");
    assert_eq!(read(Dialect::V4, 4).unwrap(), "--F-F-S-S-S-F");
    assert_eq!(read(Dialect::V4Atom, 2).unwrap(), "--F-S-F-S-F-S");
    assert_eq!(read(Dialect::V4Atom, 4).unwrap(), "--F-S-S-S-F-S");
    refused(
        read(Dialect::Hf, 2),
        "index_topk_freq: layer 2 is Shared before any layer is Full; make layer 2, the first with sparse attention, Full",
    );
}

#[test]
fn a_pattern_may_count_all_layers_or_those_with_an_indexer() {
    let at = even_from_two(9);
    let read = |letters| Pattern::new(&Spelling::Letters(letters), &at).map(|p| p.to_string());
    assert_eq!(read("FSSF").unwrap(), "--F-S-S-F");
    assert_eq!(read("--F-S-S-F").unwrap(), "--F-S-S-F");
    assert_eq!(read("SFFSSFSSF").unwrap(), "--F-S-S-F");
    refused(
        read("FSS"),
        "index_topk_pattern has 3 entries but the model has 9 layers, 4 of them with an indexer: give 9 entries, or 4 for those alone; nothing is filled in, because entries lost on the way shift every layer after the gap",
    );
    refused(
        read("FS-F"),
        "index_topk_pattern: '-' says that layer 6 has no sparse attention, but the model has an indexer there; write F or S",
    );
    refused(
        read("FFSFSFSFSF"),
        "index_topk_pattern has 10 entries but the model has 9 layers, 4 of them with an indexer: give 9 entries, or 4 for those alone; nothing is cut off, because one entry too many shifts every layer after it (draft layers are always Full and not listed)",
    );
}

#[test]
fn every_spelling_of_one_pattern_agrees() {
    let letters = ["F", "S", "F", "S", "S"];
    let types = ["full", "shared", "full", "shared", "shared"];
    for spelling in [
        Spelling::Letters("FSFSS"),
        Spelling::LetterList(&letters),
        Spelling::IndexerTypes(&types),
        Spelling::SourceLayers(&[0, 2]),
    ] {
        assert_eq!(read(spelling, 5).unwrap(), "FSFSS", "{spelling:?}");
    }
}

/// The paste that went unnoticed elsewhere: the GLM-5 1/4 pattern with three letters lost.
#[test]
fn a_75_letter_paste_for_78_layers_is_refused() {
    let whole = PUBLISHED[4].1;
    let paste = format!("{}{}", &whole[..33], &whole[36..]);
    refused(
        read(Spelling::Letters(&paste), 78),
        "index_topk_pattern has 75 entries but the model has 78 layers: give 78 entries; nothing is filled in, because entries lost on the way shift every layer after the gap",
    );
}

#[test]
fn refusals_say_what_to_change() {
    let l = |text| read(Spelling::Letters(text), 4);
    let p = "index_topk_pattern";
    refused(l("FSxF"), &format!("{p}: 'x' at position 2 is not F (Full) or S (Shared)"));
    refused(l("FSSf"), &format!("{p}: 'f' at position 3 is lower case; write F"));
    refused(l("FsSF"), &format!("{p}: 's' at position 1 is lower case; write S"));
    refused(
        l("F\u{e9}SF"),
        &format!("{p}: '\\u{{e9}}' at position 1 is not F (Full) or S (Shared)"),
    );
    refused(
        l("SFFF"),
        &format!(
            "{p}: layer 0 is Shared, but no layer before it has selected anything; make layer 0 Full"
        ),
    );
    refused(
        l("--SF"),
        &format!(
            "{p}: layer 2 is Shared before any layer is Full; make layer 2, the first with sparse attention, Full"
        ),
    );
    refused(l("----"), &format!("{p}: no layer has an indexer, so there is nothing to plan"));
    refused(
        l(""),
        &format!(
            "{p} has 0 entries but the model has 4 layers: give 4 entries; nothing is filled in, because entries lost on the way shift every layer after the gap"
        ),
    );
    refused("".parse::<Pattern>(), "the number of layers must be from 1 to 4096, got 0");
    refused(
        "F".repeat(4097).parse::<Pattern>(),
        "the number of layers must be from 1 to 4096, got 4097",
    );
    refused(Indexers::any(0), "the number of layers must be from 1 to 4096, got 0");
    refused(Indexers::any(4097), "the number of layers must be from 1 to 4096, got 4097");

    let list = |list: &[&str]| read(Spelling::LetterList(list), 3);
    refused(list(&["F", "SS", "F"]), &format!("{p}: entry 1 is \"SS\", expected \"F\" or \"S\""));
    refused(list(&["F", "", "F"]), &format!("{p}: entry 1 is \"\", expected \"F\" or \"S\""));
    refused(list(&["F", "s", "F"]), &format!("{p}: 's' at position 1 is lower case; write S"));

    let types = |list: &[&str]| read(Spelling::IndexerTypes(list), 3);
    refused(
        types(&["full", "Shared", "full"]),
        "indexer_types: entry 1 is \"Shared\", expected \"full\" or \"shared\"",
    );
    refused(
        types(&["shared", "full", "full"]),
        "indexer_types: layer 0 is Shared, but no layer before it has selected anything; make layer 0 Full",
    );

    let ids = |ids: &[i64]| read(Spelling::SourceLayers(ids), 8);
    let s = "index_source_layer_ids";
    refused(ids(&[]), &format!("{s} is empty: at least the first layer must be listed"));
    refused(ids(&[0, 4, 4]), &format!("{s}: layer 4 is listed twice"));
    refused(
        ids(&[0, 4, 2]),
        &format!("{s}: layer 2 comes after layer 4; list the layers in ascending order"),
    );
    refused(ids(&[0, 8]), &format!("{s}: layer 8 is outside 0..=7"));
    refused(ids(&[-1, 0]), &format!("{s}: layer -1 is outside 0..=7"));
    refused(
        ids(&[2, 4]),
        &format!(
            "{s}: layer 0 is Shared, but no layer before it has selected anything; make layer 0 Full"
        ),
    );
    refused(
        Pattern::new(&Spelling::SourceLayers(&[2, 3]), &even_from_two(9)),
        &format!("{s}: layer 3 has no sparse attention, so it cannot be a source"),
    );

    refused(
        freq(0, None, Dialect::Hf, 8),
        "index_topk_freq must be 1 or more (1 makes every layer Full), got 0",
    );
    refused(
        freq(-4, None, Dialect::Hf, 8),
        "index_topk_freq must be 1 or more (1 makes every layer Full), got -4",
    );
    refused(
        freq(4, Some(0), Dialect::Hf, 8),
        "index_skip_topk_offset must be 1 or more in the hf rule, got 0",
    );
    refused(
        freq(4, Some(-1), Dialect::Atom, 8),
        "index_skip_topk_offset must be 0 or more in the atom rule, got -1",
    );
    refused(
        freq(4, None, Dialect::Megatron, 8),
        "the megatron rule has no default offset (0 would make the first layer Shared); give index_skip_topk_offset",
    );
    refused(
        freq(4, Some(2), Dialect::V4, 8),
        "index_skip_topk_offset is 2, but the v4 rule has no offset; remove it or name another dialect",
    );
    refused(
        "HF".parse::<Dialect>(),
        "dialect \"HF\" is not one of hf, atom, xllm, megatron, v4, v4-atom, m3",
    );

    let topk = |topk| Plan::new("F".parse().unwrap(), Model::new(topk)).map(|_| ());
    refused(topk(0), "index_topk must be from 1 to 4096, got 0");
    refused(topk(4097), "index_topk must be from 1 to 4096, got 4097");
}

#[test]
fn exporting_the_longest_patterns_takes_no_time() {
    for letters in [format!("{}S", "F".repeat(4095)), format!("F{}F", "S".repeat(4094))] {
        let pattern: Pattern = letters.parse().unwrap();
        for dialect in Dialect::ALL {
            let _ = dialect.express(&pattern);
        }
    }
}

#[test]
fn extreme_numbers_do_not_overflow() {
    for dialect in Dialect::ALL {
        for f in [i64::MIN, -1, 0, 1, i64::MAX] {
            for o in [i64::MIN, -1, 0, 1, i64::MAX] {
                let _ = freq(f, Some(o), dialect, 16);
            }
        }
    }
    assert_eq!(freq(i64::MAX, Some(1), Dialect::Hf, 4).unwrap(), "FSSS");
    assert_eq!(freq(2, Some(i64::MAX), Dialect::Hf, 4).unwrap(), "FFFF");
}

#[test]
fn mtp_layers_are_full_and_own_index_k() {
    let model = Model { mtp_layers: 1, mtp_shares: true, ..Model::new(2048) };
    let plan = Plan::new("FSS".parse().unwrap(), model).unwrap();
    assert_eq!(plan.role(3).unwrap(), Role::Full);
    assert_eq!(plan.source(3).unwrap(), Some(3));
    assert_eq!(plan.index_k_slot(3).unwrap(), Some(1));
    assert!(plan.layer(3).unwrap().owns_index_k(3));
    assert!(plan.mtp_shares());
    assert_eq!((plan.count(Role::Full), plan.mtp_layers()), (1, 1));
    let error = plan.role(4).unwrap_err();
    assert_eq!(error.status, Status::Invalid);
    assert_eq!(error.message, "layer: expected 0 to 3 of this plan, got 4");
}

#[test]
fn rows_of_other_selections() {
    let m3 = Model { block: 128, selections: 4, ..Model::new(16) };
    assert_eq!(Plan::new("F".parse().unwrap(), m3).unwrap().row_bytes(), 4 * 16 * 4);
    let pooled = Model { key_pool: 4, always_tail: true, ..Model::new(2048) };
    let plan = Plan::new("F".parse().unwrap(), pooled).unwrap();
    assert_eq!(plan.row_bytes(), 4 * 2051);
    assert_eq!(plan.index_k_bytes_per_token(), 33.0);
    refused(
        Plan::new("F".parse().unwrap(), Model { topk: 2047, ..pooled }).map(|_| ()),
        "index_topk (2047) must be a multiple of index_kpool (4)",
    );
}

#[test]
fn a_stage_says_what_it_receives_and_sends() {
    let plan = plan("FFSFSSSF");
    let from = |source| Some(Handoff { source, row_bytes: 8192 });
    let stage = plan.slice(0, 4, false).unwrap();
    assert_eq!((stage.receive(), stage.send()), (None, from(3)));
    // Nothing of its own to send: what it received goes on.
    let stage = plan.slice(4, 6, false).unwrap();
    assert_eq!((stage.receive(), stage.send()), (from(3), from(3)));
    assert_eq!(stage.source(5).unwrap(), Some(3));
    assert!(stage.index_k_layers().is_empty());
    let stage = plan.slice(6, 8, false).unwrap();
    assert_eq!((stage.receive(), stage.send()), (from(3), None));
    assert_eq!(stage.index_k_layers(), [7]);
    assert_eq!(stage.index_k_slot(7).unwrap(), Some(0));
    assert_eq!(stage.role(5).unwrap_err().message, "layer: expected 6 to 7 of this plan, got 5");
}

#[test]
fn a_promoting_stage_selects_for_itself() {
    let plan = plan("FFSFSSSF");
    let stage = plan.slice(4, 6, true).unwrap();
    assert_eq!((stage.receive(), stage.send(), stage.promoted()), (None, None, Some(4)));
    assert_eq!(stage.role(4).unwrap(), Role::Full);
    assert_eq!(stage.source(5).unwrap(), Some(4));
    assert_eq!(stage.index_k_layers(), [4]);
    assert_eq!(stage.notes().len(), 1);
    let stage = plan.slice(0, 3, true).unwrap();
    assert_eq!((stage.receive(), stage.send(), stage.promoted()), (None, None, None));
    // A stage of a stage keeps what was promoted, and no more.
    let inner = plan.slice(4, 7, true).unwrap().slice(5, 6, false).unwrap();
    let from4 = Some(Handoff { source: 4, row_bytes: 8192 });
    assert_eq!((inner.receive(), inner.send(), inner.promoted()), (from4, from4, None));
}

#[test]
fn stages_outside_the_plan_are_refused() {
    let plan = plan("FFSF");
    for (first, last) in [(0, 0), (2, 1), (3, 5), (5, 6), (u32::MAX, u32::MAX)] {
        let error = plan.slice(first, last, false).unwrap_err();
        assert_eq!(error.status, Status::Invalid);
        assert_eq!(
            error.message,
            format!("stage: expected a range that is not empty within 0..4, got {first}..{last}")
        );
    }
    assert!(plan.slice(1, 3, false).unwrap().slice(0, 2, false).is_err());
}

/// What the end before a boundary sends is what the end after it receives, wherever the cuts are.
fn check_cuts(whole: &Plan, cuts: &[u32], promote: bool) {
    let stages: Vec<Plan> =
        cuts.windows(2).map(|w| whole.slice(w[0], w[1], promote).unwrap()).collect();
    assert_eq!(stages[0].receive(), None);
    assert_eq!(stages[stages.len() - 1].send(), None);
    for pair in stages.windows(2) {
        assert_eq!(pair[0].send(), pair[1].receive());
        assert_eq!(pair[0].model_fingerprint(), pair[1].model_fingerprint());
        assert!(!promote || pair[0].send().is_none());
    }
    for stage in &stages {
        assert_eq!(whole.model_fingerprint() == stage.model_fingerprint(), !promote);
        let mut held = stage.receive().map(|h| h.source);
        for id in stage.stage() {
            let layer = stage.layer(id).unwrap();
            match layer.role {
                Role::Full => held = Some(id),
                // Run as the stage would: what is in the buffer is what the layer wants.
                Role::Shared => assert_eq!(layer.source, held),
                Role::None => {}
            }
            if !promote {
                assert_eq!(layer.role, whole.role(id).unwrap());
                assert_eq!(layer.source, whole.source(id).unwrap());
            }
        }
        if let Some(sent) = stage.send() {
            assert_eq!(Some(sent.source), held);
        }
    }
}

#[test]
fn both_ends_of_every_cut_agree() {
    let v4 = "--F-S-S-F-F-S-S-S-F-S-";
    let all = PUBLISHED.iter().map(|p| p.1).chain([GLM52, v4]);
    for letters in all {
        let model = Model { mtp_layers: 1, ..Model::new(2048) };
        let whole = Plan::new(letters.parse().unwrap(), model).unwrap();
        let last = whole.total_layers();
        for promote in [false, true] {
            for cut in 1..last {
                check_cuts(&whole, &[0, cut, last], promote);
                for second in cut + 1..last {
                    check_cuts(&whole, &[0, cut, second, last], promote);
                }
            }
            let every: Vec<u32> = (0..=last).collect();
            check_cuts(&whole, &every, promote);
        }
    }
}

/// Pinned: these are written into cache keys, so they must never change.
#[test]
fn fingerprints_are_stable() {
    let pinned = [
        ("F", 0x336c_7586_1f5c_44ad),
        ("FSFSS", 0x7e5e_17d8_72fd_e62b),
        (GLM52, 0xba60_70c9_9b8d_455f),
    ];
    for (letters, expected) in pinned {
        let got = plan(letters).fingerprint();
        assert_eq!(got, expected, "{letters}: {got:#018x}");
    }
}

#[test]
fn fingerprints_follow_meaning() {
    let base = plan("FSFSS");
    assert_eq!(base.fingerprint(), base.model_fingerprint());
    let pattern: Pattern = "FSFSS".parse().unwrap();
    let model = Model::new(2048);
    let others = [
        Model { topk: 1024, ..model },
        Model { index_heads: 32, ..model },
        Model { index_head_dim: 64, ..model },
        Model { index_k: indexcache::plan::IndexKFormat::Bf16, ..model },
        Model { attention_heads: 64, ..model },
        Model { kv_lora_rank: 512, ..model },
        Model { rope_head_dim: 64, ..model },
        Model { block: 128, ..model },
        Model { selections: 4, ..model },
        Model { key_pool: 4, ..model },
        Model { key_pool: 4, always_tail: true, ..model },
        Model { sink: true, ..model },
        Model { mtp_layers: 1, ..model },
        Model { mtp_layers: 1, mtp_shares: true, ..model },
    ];
    let mut seen =
        vec![base.fingerprint(), plan("FSFSF").fingerprint(), plan("FSFSS-").fingerprint()];
    seen.extend(others.map(|m| Plan::new(pattern.clone(), m).unwrap().fingerprint()));
    for (first, last) in [(0, 3), (3, 5), (0, 4), (2, 5)] {
        seen.push(base.slice(first, last, false).unwrap().fingerprint());
    }
    seen.push(base.slice(3, 5, true).unwrap().fingerprint());
    let count = seen.len();
    seen.sort_unstable();
    seen.dedup();
    assert_eq!(seen.len(), count);
    // Cutting nothing off changes nothing.
    assert_eq!(base.slice(0, 5, false).unwrap().fingerprint(), base.fingerprint());
}

fn any_pattern() -> impl Strategy<Value = String> {
    ("-{0,4}F", "[FS-]{0,40}").prop_map(|(head, tail)| head + &tail)
}

proptest! {
    #[test]
    fn any_text_is_read_or_refused(text in ".{0,40}", layers in 0u64..50) {
        let _ = text.parse::<Pattern>();
        let _ = read(Spelling::Letters(&text), layers);
        let _ = text.parse::<Dialect>();
    }

    #[test]
    fn cuts_of_any_pattern_agree(letters in any_pattern(), seed in any::<u64>(), promote: bool) {
        let whole = plan(&letters);
        let last = whole.total_layers();
        let mut cuts = vec![0];
        cuts.extend((1..last).filter(|l| seed >> (l % 64) & 1 == 1));
        cuts.push(last);
        check_cuts(&whole, &cuts, promote);
    }

    #[test]
    fn any_frequency_is_exported_as_itself(
        f in 1i64..9, offset in 1i64..9, layers in 1u64..40, which in 0usize..7,
    ) {
        let dialect = Dialect::ALL[which];
        let offset = Some(offset).filter(|_| !matches!(dialect, Dialect::V4 | Dialect::V4Atom));
        let letters = freq(f, offset, dialect, layers).unwrap();
        let out = dialect.express(&letters.parse().unwrap()).unwrap();
        prop_assert_eq!(freq(out.freq, Some(out.offset), dialect, layers).unwrap(), letters);
        prop_assert!(out.freq <= f.min(layers as i64 + 1));
    }
}
