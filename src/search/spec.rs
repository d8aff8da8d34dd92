//! What to search, checked once.

use crate::error::{Error, Result};
use crate::plan::MAX_LAYERS;
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// What to search, for which model, on which calibration set.
///
/// Layers are those that have an indexer, numbered from 0: a model in which others lie between them is searched, and
/// configured afterwards, in the short form of `index_topk_pattern`. Draft layers do not count.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spec {
    /// Decoder layers that have an indexer, 2 or more.
    pub layers: u32,
    /// Tokens that an indexer selects for a row, also where it selects them in blocks.
    pub topk: u32,
    /// The host's name for exactly this model: a hash of its weights, say. Losses of one model mean nothing to another.
    pub model: String,
    /// What losses are measured on.
    pub calibration: Calibration,
    /// Layers that stay Full, ascending. Layer 0 and the first layer of each stage always do.
    pub pinned: Vec<u32>,
    /// First layer of each pipeline stage, ascending; layer 0 need not be said. With more than one stage the steps
    /// take turns, stage by stage, and each tries the flips of its own stage only.
    pub stages: Vec<u32>,
    /// How a step finds its flip.
    pub method: Method,
    /// Where to stop. `None`: when only pinned layers are Full.
    pub target_full_layers: Option<u32>,
    /// Refine the pattern with this many Full layers at the end: exchange the Full and the Shared layer of one stage
    /// that lower the loss most, until no exchange lowers it. `None`: no refinement.
    pub swap_full_layers: Option<u32>,
}

impl Spec {
    /// Plain greedy over the whole trajectory.
    pub fn new(layers: u32, topk: u32, model: impl Into<String>, calibration: Calibration) -> Self {
        Self {
            layers,
            topk,
            model: model.into(),
            calibration,
            pinned: Vec::new(),
            stages: Vec::new(),
            method: Method::Greedy,
            target_full_layers: None,
            swap_full_layers: None,
        }
    }
}

/// The rows that every loss of a search is the mean over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Calibration {
    /// The host's name for exactly these rows: a hash of their tokens, say.
    pub fingerprint: String,
    /// Tokens of each row. All must be more than `topk`: in shorter rows every layer selects everything, so reuse is
    /// exact there and the loss says nothing.
    pub row_lengths: Vec<u64>,
}

/// How a step finds its flip.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "lowercase")]
pub enum Method {
    /// Tries every flip.
    Greedy,
    /// Tries the `few` flips that raised the loss least when they were last tried. Steps 1, 2, 4, 8, … (of each stage)
    /// try every flip: that keeps the ranking fresh, and shows how often the few would have missed the best flip.
    Lazy {
        /// Flips to try, at least 1.
        few: u32,
    },
}

/// A [`Spec`] that passed its checks, as journals and results have it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    /// Layers of a pattern.
    pub layers: u32,
    /// Tokens that an indexer selects for a row.
    pub topk: u32,
    /// The model's fingerprint.
    pub model: String,
    /// The calibration set.
    pub calibration: CalibrationSummary,
    /// How a step finds its flip.
    pub method: Method,
    /// All layers that stay Full: layer 0, the first of each stage, and those that were asked for.
    pub pinned: Vec<u32>,
    /// First layer of each stage, layer 0 included.
    pub stages: Vec<u32>,
    /// Where to stop; `None` for the whole trajectory.
    pub target_full_layers: Option<u32>,
    /// Where to refine by swaps, if at all.
    pub swap_full_layers: Option<u32>,
}

/// A calibration set in short.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CalibrationSummary {
    /// The host's name for it.
    pub fingerprint: String,
    /// Number of rows.
    pub rows: u64,
    /// Tokens of the shortest row.
    pub shortest_row: u64,
}

/// What one step has to do. All of it follows from the settings: no loss takes part.
#[derive(Clone, Copy)]
pub(super) struct Turn {
    /// The stage whose flips are tried.
    pub stage: usize,
    /// Flips there are.
    pub flips: u32,
    /// Flips that are tried.
    pub tries: u32,
    /// All are tried although the method tries few, after a step that ranked them: its choice can be compared.
    pub compares: bool,
}

impl Settings {
    pub(super) fn new(spec: &Spec) -> Result<Self> {
        let layers = spec.layers;
        if !(2..=MAX_LAYERS as u32).contains(&layers) {
            return Err(Error::invalid("layers", format_args!("2 to {MAX_LAYERS}"), layers));
        }
        if spec.topk == 0 {
            return Err(Error::invalid("topk", "1 or more", 0));
        }
        for (name, text) in [("model", &spec.model), ("calibration", &spec.calibration.fingerprint)]
        {
            if text.is_empty() {
                return Err(Error::invalid(name, "a fingerprint", "an empty text"));
            }
        }
        let calibration = spec.calibration.summary(spec.topk)?;
        let stages = with_layer_0("stages", &spec.stages, layers)?;
        let mut pinned = with_layer_0("pinned", &spec.pinned, layers)?;
        pinned.extend(&stages);
        pinned.sort_unstable();
        pinned.dedup();
        let least = pinned.len() as u32;
        if least == layers {
            return Err(Error::invalid("pinned", "a layer that may become Shared", "all layers"));
        }
        if spec.method == (Method::Lazy { few: 0 }) {
            return Err(Error::invalid("few", "1 or more", 0));
        }
        let between = |name, value: Option<u32>, low: u32| match value {
            Some(v) if !(low..layers).contains(&v) => {
                Err(Error::invalid(name, format_args!("{low} to {}", layers - 1), v))
            }
            _ => Ok(()),
        };
        between("target_full_layers", spec.target_full_layers, least)?;
        let reached = spec.target_full_layers.unwrap_or(least);
        // With only pinned layers Full there is nothing to exchange.
        between("swap_full_layers", spec.swap_full_layers, reached.max(least + 1))?;
        Ok(Self {
            layers,
            topk: spec.topk,
            model: spec.model.clone(),
            calibration,
            method: spec.method,
            pinned,
            stages,
            target_full_layers: spec.target_full_layers,
            swap_full_layers: spec.swap_full_layers,
        })
    }

    /// The layers of each stage.
    pub(super) fn stage_layers(&self) -> Vec<Range<u32>> {
        let ends = self.stages.iter().skip(1).chain([&self.layers]);
        self.stages.iter().zip(ends).map(|(first, end)| *first..*end).collect()
    }

    pub(super) fn is_pinned(&self, layer: u32) -> bool {
        self.pinned.binary_search(&layer).is_ok()
    }

    /// The steps from all-Full to the target.
    pub(super) fn turns(&self) -> Vec<Turn> {
        let free = |stage: Range<u32>| stage.filter(|l| !self.is_pinned(*l)).count() as u32;
        let mut left: Vec<u32> = self.stage_layers().into_iter().map(free).collect();
        let target = self.target_full_layers.unwrap_or(self.pinned.len() as u32);
        let steps = (self.layers - target) as usize;
        let mut turns = Vec::with_capacity(steps);
        for round in 1u32.. {
            for (stage, left) in left.iter_mut().enumerate().filter(|(_, left)| **left > 0) {
                if turns.len() == steps {
                    return turns;
                }
                let few = match self.method {
                    Method::Lazy { few } => few.min(*left),
                    Method::Greedy => *left,
                };
                let all = round.is_power_of_two();
                turns.push(Turn {
                    stage,
                    flips: *left,
                    tries: if all { *left } else { few },
                    compares: all && round > 1 && few < *left,
                });
                *left -= 1;
            }
            if left.iter().all(|left| *left == 0) {
                break;
            }
        }
        turns
    }

    /// Losses that the first round of refinement needs and the steps have not brought.
    pub(super) fn first_swaps(&self, turns: &[Turn]) -> u64 {
        let Some(full) = self.swap_full_layers else { return 0 };
        let done = turns.get(..(self.layers - full) as usize).unwrap_or_default();
        let pairs = |stage: Range<u32>, number: usize| {
            let free = stage.filter(|l| !self.is_pinned(*l)).count() as u64;
            let shared = done.iter().filter(|t| t.stage == number).count() as u64;
            shared * (free - shared)
        };
        let stages = self.stage_layers().into_iter().zip(0..);
        // The last step's other trials are exchanges with the layer that it flipped.
        let known = done.last().map_or(0, |last| u64::from(last.tries) - 1);
        stages.map(|(stage, number)| pairs(stage, number)).sum::<u64>() - known
    }
}

impl Calibration {
    fn summary(&self, topk: u32) -> Result<CalibrationSummary> {
        let Some(shortest_row) = self.row_lengths.iter().copied().min() else {
            return Err(Error::invalid("row_lengths", "a calibration row or more", "none"));
        };
        if shortest_row <= u64::from(topk) {
            let row = self.row_lengths.iter().position(|n| *n == shortest_row).unwrap_or(0);
            return Err(Error::invalid(
                "row_lengths",
                format_args!(
                    "more than topk ({topk}) tokens in every calibration row, because shorter ones select everything and reuse is exact there"
                ),
                format_args!("{shortest_row} in row {row}"),
            ));
        }
        Ok(CalibrationSummary {
            fingerprint: self.fingerprint.clone(),
            rows: self.row_lengths.len() as u64,
            shortest_row,
        })
    }
}

/// A list of layers, checked, with layer 0 in front.
fn with_layer_0(name: &str, list: &[u32], layers: u32) -> Result<Vec<u32>> {
    let mut whole = vec![0];
    for (place, &layer) in list.iter().enumerate() {
        if layer >= layers {
            return Err(Error::invalid(name, format_args!("layers below {layers}"), layer));
        }
        match whole.last() {
            _ if place == 0 && layer == 0 => {}
            Some(&before) if layer <= before => {
                return Err(Error::invalid(
                    name,
                    "ascending layers",
                    format_args!("{layer} after {before}"),
                ));
            }
            _ => whole.push(layer),
        }
    }
    Ok(whole)
}
