//! Any text as a pattern: read or refused, and what is read is written back as it was.
#![no_main]

use indexcache::plan::{Dialect, Pattern};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let Ok(pattern) = text.parse::<Pattern>() else { return };
    assert_eq!(pattern.to_string(), text);
    if text.len() <= 64 {
        for dialect in Dialect::ALL {
            let _ = dialect.express(&pattern);
        }
    }
});
