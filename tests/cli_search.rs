//! `indexcache search`: the evaluator under it, what it finds, and that nothing which happens to it changes that.

#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used)]

#[path = "../src/bin/indexcache/search/baselines.rs"]
mod baselines;
#[path = "../src/bin/indexcache/search/evaluate.rs"]
mod evaluate;
#[path = "../src/bin/indexcache/search/model.rs"]
mod model;

use evaluate::Rows;
use indexcache::plan::{Pattern, Role};
use model::{Model, Prefix};
use serde_json::{Value, json};
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/tiny_dsa");
const LAYERS: usize = 12;
const TOPK: usize = 128;

fn file(name: &str) -> Vec<u8> {
    std::fs::read(format!("{MODEL}/{name}")).unwrap()
}

fn tiny() -> Model {
    Model::load(&file("config.json"), &file("model.safetensors")).unwrap()
}

fn pattern(letters: &str) -> Pattern {
    letters.parse().unwrap()
}

/// Knuth's generator: the same numbers on every run.
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) as usize % end
    }
}

/// Tolerances as in `examples/serve/tests`, where they are explained.
#[test]
fn bits_per_byte_are_those_of_pytorch() {
    let (model, text) = (tiny(), file("heldout.txt"));
    let reference: Value = serde_json::from_slice(&file("reference.json")).unwrap();
    let tolerances = [("all_full", 1e-3), ("greedy_1/4", 3e-3)];
    let mut off = [0.0; 2];
    for (window, want) in text.chunks(2048).zip(reference["windows"].as_array().unwrap()) {
        let patterns = tolerances.map(|(name, _)| pattern(want[name]["pattern"].as_str().unwrap()));
        let got = evaluate::losses(&model, &[window], &patterns, || ()).unwrap();
        for (i, (name, tolerance)) in tolerances.into_iter().enumerate() {
            let want = want[name]["bits_per_byte"].as_f64().unwrap();
            assert!((got[i] - want).abs() < tolerance, "{name}: {}, not {want}", got[i]);
            off[i] += (got[i] - want) / 4.0;
        }
    }
    assert!(off.iter().all(|off| off.abs() < 1e-3), "off by {off:?} in the mean");
}

#[test]
fn losses_are_the_same_bits_from_kept_states_and_on_any_number_of_threads() {
    let (model, text) = (tiny(), file("heldout.txt"));
    let rows = [&text[..190], &text[2048..2048 + 167]];
    let scored = 189 + 166;
    let whole = |p: &Pattern| {
        let bits = |row: &&[u8]| model.bits(row, p, &mut Prefix::default(), 0).unwrap();
        rows.iter().map(bits).sum::<f64>() / f64::from(scored)
    };
    let mut random = Random(5);
    let mut letters = || -> String {
        (0..LAYERS).map(|l| if l > 0 && random.below(2) == 0 { 'S' } else { 'F' }).collect()
    };
    // Two steps as a search takes them, then anything.
    let flip = |base: &str, l: usize| format!("{}S{}", &base[..l], &base[l + 1..]);
    let (base, next) = ("FFFFFFFFFFFF", "FFFFFSFFFFFF");
    let mut asked = vec![(base.to_string(), 0)];
    asked.extend((1..LAYERS).map(|l| (flip(base, l), l)));
    asked.extend((1..LAYERS).filter(|l| *l != 5).map(|l| (flip(next, l), l)));
    let steps = asked.len();
    asked.extend((0..8).map(|keep| (letters(), keep)));
    let patterns: Vec<Pattern> = asked.iter().map(|(letters, _)| pattern(letters)).collect();
    let want: Vec<f64> = patterns.iter().map(whole).collect();
    assert!(want.iter().collect::<Vec<_>>().windows(2).all(|w| w[0] != w[1]));

    // On three threads here, on one above.
    let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
    let all = pool.install(|| evaluate::losses(&model, &rows, &patterns, || ()).unwrap());
    assert_eq!(all, want);
    let mut kept = Rows::new(&model, &rows);
    for (i, (p, want)) in patterns.iter().zip(&want).enumerate() {
        let got = pool.install(|| kept.loss(p, asked[i].1).unwrap());
        assert_eq!(got.to_bits(), want.to_bits(), "{p}");
        if i + 1 == steps {
            // The flip of layer l runs layers l on. In the second step, layers 5 to 10 run once more, one at a time.
            let first: usize = (1..LAYERS).map(|l| LAYERS - l).sum();
            let run = LAYERS + first + (first - (LAYERS - 5)) + (10 - 5 + 1);
            assert_eq!((kept.layers_run, kept.layers_skipped), (run, 22 * LAYERS - run));
        }
    }
}

#[test]
fn similarity_is_the_best_of_all_patterns() {
    let mut random = Random(11);
    let layers = 7;
    let overlap: Vec<Vec<f64>> = (0..layers)
        .map(|_| (0..layers).map(|_| random.below(1000) as f64 / 1000.0).collect())
        .collect();
    let reused = |p: &Pattern| -> f64 {
        let source = |l: usize| (0..=l).rev().find(|s| p.roles()[*s] == Role::Full).unwrap();
        (0..layers).filter(|l| source(*l) != *l).map(|l| overlap[source(l)][l]).sum()
    };
    for full in 1..layers {
        let all = (0..1 << (layers - 1)).map(|bits: u32| {
            let rest = (0..layers - 1).map(|l| if bits >> l & 1 == 1 { 'F' } else { 'S' });
            pattern(&format!("F{}", rest.collect::<String>()))
        });
        let best = all.filter(|p| p.count(Role::Full) == full);
        let best = best.max_by(|a, b| reused(a).total_cmp(&reused(b))).unwrap();
        assert_eq!(baselines::similarity(full, &overlap).unwrap(), best);
    }
}

#[test]
fn uniform_and_random_patterns() {
    for (full, want) in
        [(1, "FSSSSSSSSSSS"), (3, "FSSSFSSSFSSS"), (5, "FSFSFSSFSFSS"), (6, "FSFSFSFSFSFS")]
    {
        assert_eq!(baselines::uniform(full, 12).unwrap(), pattern(want));
    }
    assert_eq!(baselines::without(4, 6).unwrap(), pattern("FFFFSF"));
    let mut seen = HashSet::new();
    for seed in 1..=5 {
        let mut fewer: Vec<u32> = vec![];
        for full in 1..12 {
            let p = baselines::random(full, 12, seed).unwrap();
            assert_eq!((p.roles()[0], p.count(Role::Full)), (Role::Full, full));
            let layers = p.source_layers();
            assert!(fewer.iter().all(|l| layers.contains(l)), "{p} is not nested");
            fewer = layers;
            seen.insert(p);
        }
    }
    assert!(seen.len() > 40, "seeds differ");
}

#[test]
fn overlap_is_the_shared_part_of_selections() {
    let (model, text) = (tiny(), file("heldout.txt"));
    let rows = [&text[..200], &text[4000..4260]];
    let all_full = pattern("FFFFFFFFFFFF");
    let got = evaluate::overlap(&model, &rows, &all_full).unwrap();
    let (mut want, mut tokens) = (vec![vec![0.0; LAYERS]; LAYERS], 0.0);
    for row in rows {
        let mut prefix = Prefix::default();
        model.bits(row, &all_full, &mut prefix, LAYERS).unwrap();
        let selections: Vec<&[i32]> = prefix.selections().collect();
        // From the first token that cannot select all.
        for t in TOPK..row.len() - 1 {
            tokens += 1.0;
            let set = |l: usize| -> HashSet<i32> {
                selections[l][t * TOPK..][..TOPK].iter().copied().collect()
            };
            let sets: Vec<HashSet<i32>> = (0..LAYERS).map(set).collect();
            assert!(sets.iter().all(|s| s.len() == TOPK && s.iter().all(|i| *i <= t as i32)));
            for (i, j) in (0..LAYERS * LAYERS).map(|at| (at / LAYERS, at % LAYERS)) {
                want[i][j] += sets[i].intersection(&sets[j]).count() as f64 / TOPK as f64;
            }
        }
    }
    for (i, j) in (0..LAYERS * LAYERS).map(|at| (at / LAYERS, at % LAYERS)) {
        assert!((got[i][j] - want[i][j] / tokens).abs() < 1e-6, "{i} {j}");
        assert!(i == j || got[i][j] < 0.999, "reuse is not vacuous");
    }
}

/// A new folder `name` with a copy of the model that reads rows of `context` bytes.
fn folder(name: &str, context: usize) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("search_{name}"));
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder).unwrap();
    for name in ["model.safetensors", "heldout.txt", "calibration.txt"] {
        std::fs::copy(format!("{MODEL}/{name}"), folder.join(name)).unwrap();
    }
    edit(&folder, |config| config["max_position_embeddings"] = context.into());
    folder
}

fn edit(folder: &Path, change: impl Fn(&mut Value)) {
    let path = folder.join("config.json");
    let bytes = std::fs::read(&path).unwrap_or_else(|_| file("config.json"));
    let mut config: Value = serde_json::from_slice(&bytes).unwrap();
    change(&mut config);
    std::fs::write(path, config.to_string()).unwrap();
}

/// The command, with results in `folder/out`.
fn command(folder: &Path, arguments: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_indexcache"));
    command.arg("search").arg("--model").arg(folder).arg("--out").arg(folder.join("out"));
    command.args(arguments.split_whitespace());
    command
}

fn run(folder: &Path, arguments: &str) -> (i32, String, String) {
    let output = command(folder, arguments).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

fn result(folder: &Path, name: &str) -> String {
    std::fs::read_to_string(folder.join("out").join(name)).unwrap()
}

const SMALL: &str = "--rows 3..5 --held-out-rows 2";

#[test]
fn a_search_and_its_report() {
    let folder = folder("whole", 150);
    let (status, stdout, stderr) =
        run(&folder, &format!("{SMALL} --target-full-layers 9 --swap-full-layers 9"));
    assert_eq!((status, stderr.as_str()), (0, ""), "quiet where nobody watches");
    let outcome: Value = serde_json::from_str(&result(&folder, "result.json")).unwrap();
    let report: Value = serde_json::from_str(&result(&folder, "report.json")).unwrap();
    assert_eq!(report["format"], "indexcache-search-report/1");
    assert_eq!(report["result"], outcome);
    assert_eq!(report["held_out"], json!({"rows": 2, "bytes": 300}));

    let config = std::fs::read(folder.join("config.json")).unwrap();
    let model = Model::load(&config, &file("model.safetensors")).unwrap();
    let text = |name: &str, rows: [usize; 2]| rows.map(|i| file(name)[150 * i..][..150].to_vec());
    // Evenly spaced over the 2621 rows of 150 bytes that the held-out text has.
    let (calibration, held_out) = (text("calibration.txt", [3, 4]), text("heldout.txt", [0, 1310]));
    let loss = |rows: &[Vec<u8>], letters: &Value| {
        let p = pattern(letters.as_str().unwrap());
        let bits = |row: &Vec<u8>| model.bits(row, &p, &mut Prefix::default(), 0).unwrap();
        rows.iter().map(bits).sum::<f64>() / 298.0
    };

    // What was measured is true, and each step took the best flip there was.
    let mut base = "FFFFFFFFFFFF".to_string();
    assert_eq!(outcome["all_full_loss"], loss(&calibration, &base.clone().into()));
    let steps = outcome["steps"].as_array().unwrap();
    assert_eq!(steps.len(), 3);
    for step in steps {
        let flip = |l: usize| Value::from(format!("{}S{}", &base[..l], &base[l + 1..]));
        let tried = step["evaluated"].as_array().unwrap();
        let layers: Vec<usize> = (1..LAYERS).filter(|l| &base[*l..=*l] == "F").collect();
        assert_eq!(tried.iter().map(|t| &t["layer"]).collect::<Vec<_>>(), layers);
        let losses: Vec<f64> = layers.iter().map(|l| loss(&calibration, &flip(*l))).collect();
        assert_eq!(tried.iter().map(|t| &t["loss"]).collect::<Vec<_>>(), losses);
        let best = losses.iter().copied().fold(f64::INFINITY, f64::min);
        assert_eq!(step["loss"], best);
        let flipped = layers[losses.iter().position(|l| *l == best).unwrap()];
        assert_eq!(step["pattern"], flip(flipped));
        base = step["pattern"].as_str().unwrap().to_string();
    }
    let last = &steps[2]["pattern"];
    assert_eq!(&outcome["patterns"]["3/4"]["pattern"], last);

    // So is the table, and every kind of pattern is in it.
    let table = report["table"].as_array().unwrap();
    let of = |kind: &str, full: usize| {
        let same = |e: &&Value| e["kind"] == kind && e["full_layers"] == full;
        table.iter().filter(same).collect::<Vec<_>>()
    };
    for entry in table {
        assert_eq!(entry["calibration_loss"], loss(&calibration, &entry["pattern"]));
        assert_eq!(entry["held_out_loss"], loss(&held_out, &entry["pattern"]));
        let shared = entry["pattern"].as_str().unwrap().matches('S').count();
        assert_eq!(entry["full_layers"], LAYERS - shared);
        assert_eq!(entry["indexer_time_saved"], shared as f64 / LAYERS as f64);
    }
    assert_eq!(of("all-full", 12).len(), 1);
    for full in 9..LAYERS {
        assert_eq!(of("greedy", full)[0]["pattern"], steps[11 - full]["pattern"]);
        let uniform = baselines::uniform(full, LAYERS).unwrap().to_string();
        assert_eq!(of("uniform", full)[0]["pattern"], uniform);
        assert_eq!(of("similarity", full).len(), 1);
        assert_eq!(of("greedy+swaps", full).len(), usize::from(full == 9));
    }
    let refined = of("greedy+swaps", 9)[0]["calibration_loss"].as_f64().unwrap();
    assert!(refined < steps[2]["loss"].as_f64().unwrap(), "an exchange helped");

    let all_full = outcome["all_full_loss"].as_f64().unwrap();
    let sensitivity = report["sensitivity"].as_array().unwrap();
    for (alone, tried) in sensitivity.iter().zip(steps[0]["evaluated"].as_array().unwrap()) {
        assert_eq!((&alone["layer"], &alone["loss"]), (&tried["layer"], &tried["loss"]));
        assert_eq!(alone["rise"], tried["loss"].as_f64().unwrap() - all_full);
    }
    assert_eq!(sensitivity.len(), LAYERS - 1);
    let rows: Vec<&[u8]> = calibration.iter().map(Vec::as_slice).collect();
    let overlap = evaluate::overlap(&model, &rows, &pattern("FFFFFFFFFFFF")).unwrap();
    assert_eq!(report["overlap"], json!(overlap));
    let time = &report["time"];
    assert_eq!(time["evaluations"], outcome["evaluations"]);
    let layers = |key: &str| time[key].as_u64().unwrap();
    let all = outcome["evaluations"].as_u64().unwrap() * LAYERS as u64;
    assert_eq!(layers("layers_run") + layers("layers_skipped_by_cached_states"), all);

    // The table for a person says the same.
    let line = |full: usize| stdout.lines().find(|l| l.starts_with(&format!("{full:4} "))).unwrap();
    for (full, kind) in [(12, "all-full"), (9, "greedy"), (9, "uniform"), (9, "similarity")] {
        let loss = of(kind, full)[0]["held_out_loss"].as_f64().unwrap();
        assert!(line(full).contains(&format!("{loss:.4}")), "{kind} {full}\n{stdout}");
    }
    assert!(stdout.contains(&format!("3/4 {}", last.as_str().unwrap())), "{stdout}");
    assert!(stdout.contains("after exchanges"), "{stdout}");

    // Once more, with nothing left to do but the report.
    let before = result(&folder, "result.json");
    let (status, stdout, _) =
        run(&folder, &format!("{SMALL} --target-full-layers 9 --swap-full-layers 9 --json"));
    assert_eq!(status, 0);
    assert_eq!(stdout, result(&folder, "report.json"));
    assert_eq!(before, result(&folder, "result.json"));
    let again: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(again["time"]["evaluations"], 0);
    for part in ["result", "table", "overlap", "sensitivity"] {
        assert_eq!(again[part], report[part]);
    }
}

#[test]
fn lazy_pinned_and_in_stages() {
    let folder = folder("options", 140);
    let (status, _, stderr) =
        run(&folder, &format!("{SMALL} --lazy 2 --pinned 7 --stages 6 --target-full-layers 5"));
    assert_eq!((status, stderr.as_str()), (0, ""));
    let outcome: Value = serde_json::from_str(&result(&folder, "result.json")).unwrap();
    assert_eq!(outcome["method"], json!({"name": "lazy", "few": 2}));
    assert_eq!((&outcome["pinned"], &outcome["stages"]), (&json!([0, 6, 7]), &json!([0, 6])));
    assert_eq!(outcome["model"].as_str().unwrap().len(), "sha256:".len() + 64);
    assert!(outcome["saved_evaluations"].as_u64().unwrap() > 0);
    let last = outcome["steps"].as_array().unwrap().last().unwrap();
    let last = last["pattern"].as_str().unwrap();
    assert!([0, 6, 7].iter().all(|l| &last[*l..=*l] == "F"), "{last}");
    let report: Value = serde_json::from_str(&result(&folder, "report.json")).unwrap();
    assert_eq!(report["sensitivity"].as_array().unwrap().len(), LAYERS - 1);
    let random = report["table"].as_array().unwrap().iter().filter(|e| e["kind"] == "random");
    let seeds = random.map(|e| (e["full_layers"].as_u64().unwrap(), e["seed"].as_u64().unwrap()));
    assert_eq!(seeds.collect::<Vec<_>>(), (1..=5).map(|seed| (6, seed)).collect::<Vec<_>>());
}

fn start(folder: &Path, arguments: &str) -> Child {
    command(folder, arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

#[test]
fn killed_at_random_moments_it_ends_with_the_same_result() {
    let undisturbed = folder("undisturbed", 140);
    let arguments = "--rows 0..1 --held-out-rows 1";
    assert_eq!(run(&undisturbed, arguments).0, 0);

    let killed = folder("killed", 140);
    let journal = killed.join("out/journal.jsonl");
    let kept = || {
        let mut bytes = std::fs::read(&journal).unwrap_or_default();
        bytes.truncate(bytes.iter().rposition(|b| *b == b'\n').map_or(0, |end| end + 1));
        String::from_utf8(bytes).unwrap()
    };
    let lines = || kept().lines().count();
    let mut random = Random(2026);
    for _ in 0..10 {
        let before = kept();
        let stop = lines() + random.below(10);
        let mut child = start(&killed, arguments);
        while lines() < stop && child.try_wait().unwrap().is_none() {
            sleep(Duration::from_millis(1));
        }
        sleep(Duration::from_millis(random.below(40) as u64));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(kept().starts_with(&before), "it went on from there");
    }
    assert!(!killed.join("out/result.json").exists(), "killed before the end");
    assert!((5..60).contains(&lines()), "killed on the way: {} lines", lines());
    assert_eq!(run(&killed, arguments).0, 0);
    assert_eq!(result(&killed, "result.json"), result(&undisturbed, "result.json"));
    // The header, and 67 losses, each once.
    assert_eq!(result(&killed, "journal.jsonl"), result(&undisturbed, "journal.jsonl"));
    assert_eq!(lines(), 68);
}

#[test]
fn another_search_is_refused_on_resume() {
    let folder = folder("resume", 140);
    let arguments = "--rows 0..1 --held-out-rows 1 --target-full-layers 11";
    assert_eq!(run(&folder, arguments).0, 0);
    let files = ["journal.jsonl", "result.json", "report.json"];
    let before = files.map(|name| result(&folder, name));
    for (other, why) in [
        ("--rows 1..2 --held-out-rows 1 --target-full-layers 11", "calibration"),
        ("--rows 0..2 --held-out-rows 1 --target-full-layers 11", "calibration"),
        ("--rows 0..1 --held-out-rows 1 --target-full-layers 10", "target_full_layers"),
        ("--rows 0..1 --held-out-rows 1 --target-full-layers 11 --lazy 3", "method"),
        ("--rows 0..1 --held-out-rows 1 --target-full-layers 11 --pinned 3", "pinned"),
    ] {
        let (status, stdout, stderr) = run(&folder, other);
        assert_eq!((status, stdout.as_str()), (1, ""), "{other}: {stderr}");
        assert!(stderr.contains(why) && stderr.contains("journal.jsonl"), "{other}: {stderr}");
    }
    // The pattern in use may change; nothing else of the model may.
    assert!(serde_json::to_value(tiny().config()).unwrap().get("index_topk_pattern").is_none());
    edit(&folder, |config| config["index_topk_pattern"] = "FSFSFSFSFSFS".into());
    assert_eq!(run(&folder, arguments).0, 0);
    edit(&folder, |config| config["rope_theta"] = 10001.0.into());
    let (status, _, stderr) = run(&folder, arguments);
    assert_eq!(status, 1);
    assert!(stderr.contains("model: expected"), "{stderr}");
    edit(&folder, |config| config["rope_theta"] = 10000.0.into());
    let mut weights = file("model.safetensors");
    *weights.last_mut().unwrap() ^= 1;
    std::fs::write(folder.join("model.safetensors"), weights).unwrap();
    let (status, _, stderr) = run(&folder, arguments);
    assert_eq!(status, 1);
    assert!(stderr.contains("model: expected"), "{stderr}");
    assert_eq!(before[..2], files.map(|name| result(&folder, name))[..2]);
}

#[test]
fn what_cannot_be_searched_is_refused() {
    let small = folder("refused", 140);
    for (arguments, status, why) in [
        ("--rows 1400..1408", 2, "expected a row 1404 of 140 bytes, got 1404 rows"),
        ("--held-out-rows 2809", 2, "heldout.txt: expected a row 2808 of 140 bytes, got 2808 rows"),
        ("--held-out-rows 0", 2, "0 is not in 1.."),
        ("--calibration /nonexistent", 2, "/nonexistent cannot be read"),
        ("--rows 3..3", 2, "rows as in 0..32"),
        ("--rows x", 2, "rows as in 0..32"),
        ("--pinned 12", 1, "pinned: expected layers below 12, got 12"),
        ("--target-full-layers 12", 1, "target_full_layers: expected 1 to 11, got 12"),
        ("--lazy 0", 2, "0 is not in 1.."),
        ("--swap-full-layers 1", 1, "swap_full_layers: expected 2 to 11"),
    ] {
        let got = run(&small, arguments);
        assert_eq!((got.0, got.1.as_str()), (status, ""), "{arguments}: {}", got.2);
        assert!(got.2.contains(why), "{arguments}: {}", got.2);
    }
    // 129 bytes are 128 tokens to read: all are selected.
    let (status, _, stderr) = run(&folder("vacuous", 129), "--rows 0..1 --held-out-rows 1");
    assert_eq!(status, 1);
    assert!(stderr.contains("row_lengths: expected more than topk (128)"), "{stderr}");

    type Change = fn(&mut Value);
    let cases: [(Change, &str); 7] = [
        (|c| c["hidden_size"] = 512.into(), "expected BF16 [256, 512], got BF16 [256, 256]"),
        (|c| c["num_hidden_layers"] = 13.into(), "first_k_dense_replace: expected 13, got 12"),
        (|c| c["vocab_size"] = 50000.into(), "vocab_size: expected 256, got 50000"),
        (|c| c["hidden_act"] = "gelu".into(), "hidden_act: expected silu, got gelu"),
        (|c| c["rope_interleave"] = false.into(), "rope_interleave: expected true, got false"),
        (|c| c["kv_lora_rank"] = 0.into(), "kv_lora_rank: expected 1 to 65536, got 0"),
        (|c| drop(c.as_object_mut().unwrap().remove("q_lora_rank")), "missing field `q_lora_rank`"),
    ];
    for (change, why) in cases {
        let folder = folder("config", 140);
        edit(&folder, change);
        let (status, _, stderr) = run(&folder, SMALL);
        assert_eq!(status, 1, "{stderr}");
        assert!(stderr.contains(why), "{why}: {stderr}");
    }
    std::fs::write(small.join("model.safetensors"), &file("model.safetensors")[..100_000]).unwrap();
    let (status, _, stderr) = run(&small, SMALL);
    assert!(status == 1 && stderr.contains("model.safetensors: "), "{stderr}");
    std::fs::remove_file(small.join("model.safetensors")).unwrap();
    assert_eq!(run(&small, SMALL).0, 2);
    assert!(!small.join("out").exists(), "nothing was begun");
}
