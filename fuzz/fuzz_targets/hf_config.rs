//! Any bytes as a config: read or refused, and what is read holds together.
#![no_main]

use indexcache::plan::{Plan, Role};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Ok(plan) = Plan::from_hf_config(bytes) else { return };
    let last = plan.total_layers();
    for id in 0..last {
        let layer = plan.layer(id).expect("a layer of the plan");
        assert_eq!(layer.source.is_some(), layer.role != Role::None);
        assert_eq!(layer.index_k_slot.is_some(), layer.role == Role::Full);
    }
    let half = last.div_ceil(2);
    for promote in [false, true] {
        let front = plan.slice(0, half, promote).expect("the first stage");
        if half < last {
            let back = plan.slice(half, last, promote).expect("the second stage");
            assert_eq!(front.send(), back.receive());
        }
    }
    plan.to_json().expect("JSON");
});
