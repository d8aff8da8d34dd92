//! Mean losses of patterns over rows of text, all cores at work.

use super::model::{Model, Prefix};
use indexcache::audit;
use indexcache::error::Result;
use indexcache::plan::Pattern;
use rayon::prelude::*;

/// Rows of text, each with the states that the search's next candidates will start from.
pub struct Rows<'a> {
    model: &'a Model,
    rows: Vec<(&'a [u8], Prefix)>,
    /// Layers that all rows ran, and those they took from kept states instead.
    pub layers_run: usize,
    pub layers_skipped: usize,
}

impl<'a> Rows<'a> {
    pub fn new(model: &'a Model, texts: &[&'a [u8]]) -> Self {
        let rows = texts.iter().map(|text| (*text, Prefix::default())).collect();
        Rows { model, rows, layers_run: 0, layers_skipped: 0 }
    }

    /// Mean bits per byte. States behind the first `keep` layers, which the patterns to come share, are kept.
    pub fn loss(&mut self, pattern: &Pattern, keep: usize) -> Result<f64> {
        let model = self.model;
        let first = self.rows.first().map_or(0, |(_, prefix)| prefix.shared(pattern));
        // With nothing kept yet, all that a later pattern may share.
        let keep = if first == 0 { model.layers() - 1 } else { keep };
        let rows = self.rows.par_iter_mut();
        let bits = rows.map(|(text, prefix)| model.bits(text, pattern, prefix, keep));
        let bits: Vec<f64> = bits.collect::<Result<_>>()?;
        self.layers_run += model.layers() - first;
        self.layers_skipped += first;
        Ok(mean(bits.iter().sum(), self.rows.iter().map(|(text, _)| *text)))
    }
}

/// Mean bits per byte of each pattern. One row after the other takes all patterns, in an order in which those that
/// begin alike follow one another; `done` is told of each.
pub fn losses(
    model: &Model,
    texts: &[&[u8]],
    patterns: &[Pattern],
    done: impl Fn() + Sync,
) -> Result<Vec<f64>> {
    let mut order: Vec<usize> = (0..patterns.len()).collect();
    order.sort_by_cached_key(|i| patterns[*i].to_string());
    let row = |text: &&[u8]| {
        let mut prefix = Prefix::default();
        let mut bits = vec![0.0; patterns.len()];
        for (at, &i) in order.iter().enumerate() {
            let next = order.get(at + 1).map(|next| &patterns[*next]);
            let alike = next.and_then(|next| patterns[i].first_difference(next));
            let keep = alike.unwrap_or(0);
            bits[i] = model.bits(text, &patterns[i], &mut prefix, keep)?;
            done();
        }
        Ok(bits)
    };
    let rows: Vec<Vec<f64>> = texts.par_iter().map(row).collect::<Result<_>>()?;
    let total = |i: usize| rows.iter().map(|bits| bits[i]).sum();
    Ok((0..patterns.len()).map(|i| mean(total(i), texts.iter().copied())).collect())
}

/// Every byte is scored but the first of its row.
fn mean<'a>(bits: f64, texts: impl Iterator<Item = &'a [u8]>) -> f64 {
    bits / texts.map(|text| text.len() - 1).sum::<usize>() as f64
}

/// `[i][j]`: the mean share of what layer `j` selects that layer `i` selects too, with every layer Full. Tokens that
/// see no more than top-k others do not count: they select all.
pub fn overlap(model: &Model, texts: &[&[u8]], all_full: &Pattern) -> Result<Vec<Vec<f64>>> {
    let (layers, topk) = (model.layers(), model.topk());
    let row = |text: &&[u8]| {
        let mut prefix = Prefix::default();
        model.bits(text, all_full, &mut prefix, layers)?;
        let selections: Vec<&[i32]> = prefix.selections().collect();
        let shared = |i: usize, j: usize| -> f64 {
            let tokens = |l: usize| selections[l].chunks_exact(topk).skip(topk);
            tokens(j).zip(tokens(i)).map(|(own, other)| f64::from(audit::overlap(own, other))).sum()
        };
        Ok((0..layers * layers).map(|at| shared(at / layers, at % layers)).collect())
    };
    let rows: Vec<Vec<f64>> = texts.par_iter().map(row).collect::<Result<_>>()?;
    let tokens: usize = texts.iter().map(|text| text.len().saturating_sub(1 + topk)).sum();
    let mean = |i, j| rows.iter().map(|row| row[i * layers + j]).sum::<f64>() / tokens as f64;
    Ok((0..layers).map(|i| (0..layers).map(|j| mean(i, j)).collect()).collect())
}
