//! Patterns to compare a searched one with.

use indexcache::error::Result;
use indexcache::plan::{Indexers, Pattern, Spelling};
use sha2::{Digest, Sha256};

/// `full` of `layers` layers, evenly spread.
pub fn uniform(full: usize, layers: usize) -> Result<Pattern> {
    pattern((0..full).map(|i| i * layers / full), layers)
}

/// Layer 0 and `full - 1` others, by chance. With one more Full layer, a seed's pattern keeps those it has.
pub fn random(full: usize, layers: usize, seed: u32) -> Result<Pattern> {
    let mut others: Vec<usize> = (1..layers).collect();
    others.sort_by_cached_key(|layer| Sha256::digest(format!("{seed} {layer}")));
    others.truncate(full - 1);
    pattern([0].into_iter().chain(others), layers)
}

/// The pattern of `full` Full layers in which Shared layers reuse most of what they would select themselves: the one
/// with the largest sum of `overlap[source][layer]` over its Shared layers.
pub fn similarity(full: usize, overlap: &[Vec<f64>]) -> Result<Pattern> {
    let layers = overlap.len();
    // What Full layer `first` gives to those after it, before layer `end`.
    let gain = |first: usize, end: usize| overlap[first][first + 1..end].iter().sum::<f64>();
    // `[more][first]`: the largest sum that layer `first`, Full, and `more` Full layers after it can give, and which
    // of those is next.
    let mut best: Vec<Vec<(f64, usize)>> =
        vec![(0..layers).map(|first| (gain(first, layers), layers)).collect()];
    for more in 1..full {
        let rest = &best[more - 1];
        let choose = |first: usize| {
            let nexts = (first + 1..layers).map(|next| (gain(first, next) + rest[next].0, next));
            nexts.fold((f64::NEG_INFINITY, layers), |a, b| if b.0 > a.0 { b } else { a })
        };
        best.push((0..layers).map(choose).collect());
    }
    let mut chosen = vec![0];
    for choices in best.iter().skip(1).rev() {
        chosen.push(choices[chosen[chosen.len() - 1]].1);
    }
    pattern(chosen, layers)
}

/// Every layer but one Full.
pub fn without(layer: usize, layers: usize) -> Result<Pattern> {
    pattern((0..layers).filter(|l| *l != layer), layers)
}

fn pattern(full: impl IntoIterator<Item = usize>, layers: usize) -> Result<Pattern> {
    let mut ids: Vec<i64> = full.into_iter().map(|layer| layer as i64).collect();
    ids.sort_unstable();
    Pattern::new(&Spelling::SourceLayers(&ids), &Indexers::exactly(vec![true; layers])?)
}
