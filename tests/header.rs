//! The public header is what the sources say: generates it and compares. `INDEXCACHE_BLESS=1` writes it instead.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::fmt::Write as _;
use std::path::Path;

const SOURCES: [&str; 7] = ["mod", "types", "context", "plan", "cache", "ops", "search"];

/// One `idxc_` function of the header: name, and its prototype around the name.
struct Function {
    name: String,
    prototype: String,
    comment: String,
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn cbindgen_header() -> String {
    // cbindgen follows the `mod` lines.
    let builder = cbindgen::Builder::new()
        .with_config(cbindgen::Config::from_file(root().join("cbindgen.toml")).unwrap())
        .with_src(root().join("src/capi/mod.rs"));
    let mut text = Vec::new();
    builder.generate().unwrap().write(&mut text);
    tidy(&String::from_utf8(text).unwrap())
}

/// Rust's own safety sections mean nothing to C.
fn tidy(header: &str) -> String {
    let mut out = String::new();
    let mut skipping = false;
    for line in header.lines() {
        let body = line.trim_start().trim_start_matches('*').trim();
        if body == "# Safety" {
            skipping = true;
            while out.ends_with(" *\n") {
                out.truncate(out.len() - 3);
            }
            continue;
        }
        if skipping && line.trim_start().starts_with("*/") {
            skipping = false;
        }
        if !skipping {
            writeln!(out, "{}", line.trim_end()).unwrap();
        }
    }
    out
}

fn functions(header: &str) -> Vec<Function> {
    let mut found = Vec::new();
    let (mut comment, mut statement) = (String::new(), String::new());
    let mut in_comment = false;
    for line in header.lines() {
        if line.starts_with("/**") || line.starts_with("/*") {
            in_comment = true;
            comment.clear();
            statement.clear();
        }
        if in_comment {
            writeln!(comment, "{line}").unwrap();
            in_comment = !line.trim_end().ends_with("*/");
            continue;
        }
        if line.is_empty() || line.starts_with('#') || line.starts_with("typedef") {
            statement.clear();
            continue;
        }
        statement.push_str(line.trim());
        statement.push(' ');
        if line.trim_end().ends_with(");") {
            let at = statement.find('(').unwrap_or(0);
            if let Some(start) = statement[..at].rfind("idxc_") {
                let name = statement[start..at].to_owned();
                found.push(Function {
                    name,
                    prototype: statement.trim().to_owned(),
                    comment: comment.clone(),
                });
            }
            statement.clear();
        }
    }
    found
}

/// Each struct that starts with `struct_size`, with its initialiser.
fn initialisers(header: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut current: Option<(String, Vec<&str>)> = None;
    let mut in_comment = false;
    for line in header.lines() {
        let t = line.trim();
        if t.starts_with("/*") {
            in_comment = true;
        }
        if in_comment {
            in_comment = !t.ends_with("*/");
            continue;
        }
        if let Some(name) = t.strip_prefix("typedef struct ").and_then(|r| r.strip_suffix(" {")) {
            current = Some((name.to_owned(), Vec::new()));
        } else if t.starts_with('}') {
            if let Some((name, fields)) = current.take()
                && let Some((&"uint32_t struct_size;", rest)) = fields.split_first()
            {
                // NULL, because hosts build with -Wzero-as-null-pointer-constant; no cast, because of -Wold-style-cast.
                let zeros: String =
                    rest.iter().map(|f| if f.contains('*') { ", NULL" } else { ", 0" }).collect();
                let value = format!("{{ sizeof({name}){zeros} }}");
                found.push((name, value));
            }
        } else if let Some((_, fields)) = &mut current
            && t.ends_with(';')
        {
            fields.push(t);
        }
    }
    found
}

fn full_header() -> String {
    let base = cbindgen_header();
    let functions = functions(&base);
    let mut extra = String::new();
    for (name, value) in initialisers(&base) {
        writeln!(extra, "/** Initialiser of `{name}`: all defaults. */").unwrap();
        writeln!(extra, "#define {}_INIT {value}\n", name.to_uppercase()).unwrap();
    }
    writeln!(extra, "/** The functions above, for hosts that load the library at run time; see `idxc_get_api`. */").unwrap();
    writeln!(extra, "struct idxc_api {{").unwrap();
    writeln!(
        extra,
        "  /** Bytes of this table in the library: a function past its end does not exist there. */"
    )
    .unwrap();
    writeln!(extra, "  uint32_t struct_size;").unwrap();
    writeln!(extra, "  /** ABI version of the library. */\n  uint32_t version;").unwrap();
    for name in indexcache::capi::table::NAMES {
        let f = functions
            .iter()
            .find(|f| f.name == *name)
            .unwrap_or_else(|| panic!("{name} not in header"));
        let member = f.prototype.replacen(&format!("{name}("), &format!("(*{name})("), 1);
        writeln!(extra, "  {member}").unwrap();
    }
    writeln!(extra, "}};\n").unwrap();
    let end = base.rfind("#ifdef __cplusplus").unwrap();
    format!("{}{}{}", &base[..end], extra, &base[end..])
}

#[test]
fn header_is_what_the_sources_say() {
    let path = root().join("include/indexcache/indexcache.h");
    let want = full_header();
    if std::env::var_os("INDEXCACHE_BLESS").is_some() {
        std::fs::write(&path, &want).unwrap();
    }
    let have = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        have == want,
        "{} is out of date: run INDEXCACHE_BLESS=1 cargo test --test header",
        path.display()
    );
}

#[test]
fn every_function_is_in_the_table_and_says_its_promises() {
    let functions = functions(&cbindgen_header());
    let names: Vec<&str> = functions.iter().map(|f| f.name.as_str()).collect();
    for name in indexcache::capi::table::NAMES {
        let times = names.iter().filter(|n| *n == name).count();
        assert!(times == 1, "{name} is in the table once, in the header {times} times");
    }
    for f in &functions {
        let in_table = indexcache::capi::table::NAMES.contains(&f.name.as_str());
        assert!(in_table || f.name == "idxc_get_api", "{} is not in the table", f.name);
        for line in ["Ownership:", "Threads:", "Stream:", "Graph capture:", "Errors:"] {
            assert!(f.comment.contains(&format!("- {line} ")), "{}: no line \"{line}\"", f.name);
        }
    }
}

#[test]
fn every_exported_body_is_guarded() {
    for name in SOURCES.iter().chain(&["table"]) {
        let text = std::fs::read_to_string(root().join(format!("src/capi/{name}.rs"))).unwrap();
        for part in text.split("#[unsafe(no_mangle)]").skip(1) {
            let body = part.split("\n}\n").next().unwrap();
            assert!(
                body.contains("guard(\"idxc_")
                    || body.contains("guard_value(")
                    || body.contains("take(\"idxc_"),
                "unguarded: {}",
                body.lines().next().unwrap_or("").to_owned() + body.lines().nth(1).unwrap_or("")
            );
        }
    }
}

/// The name in a guard is what error texts start with.
#[test]
fn guards_name_their_own_function() {
    for name in SOURCES.iter().chain(&["table"]) {
        let text = std::fs::read_to_string(root().join(format!("src/capi/{name}.rs"))).unwrap();
        for part in text.split("#[unsafe(no_mangle)]").skip(1) {
            let body = part.split("\n}\n").next().unwrap();
            let function = body.split("fn ").nth(1).unwrap().split('(').next().unwrap();
            for guarded in body.split("guard(\"").skip(1).chain(body.split("take(\"").skip(1)) {
                assert_eq!(guarded.split('"').next().unwrap(), function);
            }
        }
    }
}
