//! What a search found, for people and programs.

use super::Settings;
use super::journal::not_json;
use crate::error::Result;
use crate::plan::Pattern;
use serde::{Deserialize, Serialize};
use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

/// What a search found so far. Its JSON keys are a promise: others read them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// `indexcache-search/1`.
    pub format: String,
    /// What was searched.
    #[serde(flatten)]
    pub settings: Settings,
    /// Whether the search has ended; before that, everything below is as far as it got.
    pub complete: bool,
    /// Loss of plain DSA; `None` until it is reported.
    pub all_full_loss: Option<f64>,
    /// The trajectory: each step's pattern has one Full layer less than the one before.
    pub steps: Vec<Step>,
    /// Exchanges that lowered the loss at `swap_full_layers`, in order; the last has the refined pattern. With none,
    /// the trajectory's own pattern was not improved upon.
    pub swaps: Vec<Swap>,
    /// Losses that were reported.
    pub evaluations: u64,
    /// Flips that plain greedy would have tried at the same steps, less those that were tried.
    pub saved_evaluations: u64,
    /// How often trying few flips would have missed the best.
    pub lazy_differs: LazyDiffers,
    /// The trajectory's patterns by the share of layers that keep their indexer: every `n/layers` in lowest terms, and
    /// 1/2, 1/4, 1/8, rounded up to whole layers. Each pattern's Full layers are among those of any larger one.
    pub patterns: BTreeMap<Retention, PatternLoss>,
}

impl Outcome {
    /// As one JSON object.
    pub fn to_json(&self) -> Result<String> {
        serde_json::to_string_pretty(self).map_err(|e| not_json(&e))
    }
}

/// One layer turned Shared.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Step {
    /// Full layers afterwards.
    pub full_layers: u32,
    /// The layer that became Shared.
    pub flipped: u32,
    /// The pattern afterwards.
    pub pattern: Pattern,
    /// Its loss.
    pub loss: f64,
    /// Every flip that was tried, by layer, with the loss it led to.
    pub evaluated: Vec<LayerLoss>,
}

/// A flip that was tried.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayerLoss {
    /// The layer that would become Shared.
    pub layer: u32,
    /// The loss of the pattern with it Shared.
    pub loss: f64,
}

/// A Full and a Shared layer exchanged.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Swap {
    /// Full layers, before and afterwards.
    pub full_layers: u32,
    /// The layer that became Shared.
    pub to_shared: u32,
    /// The layer that became Full.
    pub to_full: u32,
    /// The pattern afterwards.
    pub pattern: Pattern,
    /// Its loss.
    pub loss: f64,
}

/// How the choice among few flips compares with the choice among all, at the steps that tried all of them to know.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LazyDiffers {
    /// Steps at which the few were fewer than all, and all were tried; 0 for plain greedy.
    pub compared: u64,
    /// Those at which the best flip was not among the few (it was taken nevertheless).
    pub differed: u64,
}

/// A pattern of the trajectory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PatternLoss {
    /// Its Full layers.
    pub full_layers: u32,
    /// For `index_topk_pattern`.
    pub pattern: Pattern,
    /// Its loss.
    pub loss: f64,
}

/// A share of the layers in lowest terms, `1/4`. Ordered by value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Retention {
    part: u32,
    whole: u32,
}

impl Retention {
    /// `part / whole`, reduced; `None` for a whole of 0.
    pub fn new(part: u32, whole: u32) -> Option<Self> {
        let (mut a, mut b) = (part, whole);
        while b != 0 {
            (a, b) = (b, a % b);
        }
        (whole != 0).then(|| Self { part: part / a, whole: whole / a })
    }

    /// This share of `layers`, rounded up to whole layers.
    pub fn of(self, layers: u32) -> u32 {
        let exact = u64::from(self.part) * u64::from(layers);
        u32::try_from(exact.div_ceil(u64::from(self.whole))).unwrap_or(u32::MAX)
    }
}

impl Ord for Retention {
    fn cmp(&self, other: &Self) -> Ordering {
        let cross = |a: &Self, b: &Self| u64::from(a.part) * u64::from(b.whole);
        cross(self, other).cmp(&cross(other, self))
    }
}

impl PartialOrd for Retention {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl fmt::Display for Retention {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.part, self.whole)
    }
}

impl FromStr for Retention {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let read = || {
            let (part, whole) = text.split_once('/')?;
            Self::new(part.parse().ok()?, whole.parse().ok()?)
        };
        read().ok_or_else(|| format!("expected a fraction such as 1/4, got {text:?}"))
    }
}

impl TryFrom<String> for Retention {
    type Error = String;

    fn try_from(text: String) -> std::result::Result<Self, String> {
        text.parse()
    }
}

impl From<Retention> for String {
    fn from(retention: Retention) -> Self {
        retention.to_string()
    }
}

/// [`Outcome::patterns`] of a trajectory.
pub(super) fn patterns(layers: u32, steps: &[Step]) -> BTreeMap<Retention, PatternLoss> {
    let at = |full: u32| steps.iter().find(|s| s.full_layers == full);
    let exact = steps.iter().filter_map(|s| Some((Retention::new(s.full_layers, layers)?, s)));
    let round = [2, 4, 8]
        .into_iter()
        .filter_map(|whole| Retention::new(1, whole))
        .filter_map(|retention| Some((retention, at(retention.of(layers))?)));
    exact
        .chain(round)
        .map(|(retention, s)| {
            let pattern = s.pattern.clone();
            (retention, PatternLoss { full_layers: s.full_layers, pattern, loss: s.loss })
        })
        .collect()
}
