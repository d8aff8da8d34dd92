//! `index_topk_freq` and `index_skip_topk_offset`: one formula, counted seven ways.
//!
//! Everybody computes `Shared iff max(x - offset, 0) % freq != 0`. They differ in what `x` counts and in the
//! offset used when the config gives none, so the same two numbers mean different patterns.

use super::pattern::{Indexers, Pattern, Role};
use crate::error::{Error, Result};
use std::fmt;
use std::str::FromStr;

/// Whose reading of `index_topk_freq` and `index_skip_topk_offset`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Dialect {
    /// Transformers, vLLM, SGLang, TensorRT-LLM, lmdeploy: `max(layer - offset + 1, 0) % freq`, default 2.
    Hf = 0,
    /// ATOM, and the configuration class of glm5_next: `max(layer - offset, 0) % freq`, default 1.
    Atom = 1,
    /// xLLM before it read `indexer_types`: `layer <= offset or (layer - offset) % freq == 0` is Full, default 0.
    Xllm = 2,
    /// Megatron and its trainers: the Hf rule over a `layer_number` counted from 1; no usable default.
    Megatron = 3,
    /// vLLM and vLLM-Ascend for DeepSeek-V4: `max(ordinal - 1, 0) % freq` among the layers with an indexer.
    V4 = 4,
    /// ATOM for DeepSeek-V4: `ordinal % freq` among the layers with an indexer.
    V4Atom = 5,
    /// vLLM and ATOM for MiniMax-M3: `max(ordinal - offset, 0) % freq` among the sparse layers, default 0.
    M3 = 6,
}

/// What a dialect counts, and from where.
struct Rule {
    name: &'static str,
    /// Among the layers with an indexer, instead of all layers.
    ordinal: bool,
    /// 1 when the first layer is number 1 (`layer + 1 - offset`), else 0.
    base: i64,
    default: Option<i64>,
    /// The servers of this dialect read `index_skip_topk_offset`.
    reads_offset: bool,
}

impl Rule {
    const fn new(name: &'static str, base: i64, default: Option<i64>) -> Self {
        Self { name, ordinal: false, base, default, reads_offset: true }
    }

    const fn ordinal(self) -> Self {
        Self { ordinal: true, ..self }
    }
}

impl Dialect {
    /// All of them, in numeric order.
    pub const ALL: [Dialect; 7] = [
        Dialect::Hf,
        Dialect::Atom,
        Dialect::Xllm,
        Dialect::Megatron,
        Dialect::V4,
        Dialect::V4Atom,
        Dialect::M3,
    ];

    const fn rule(self) -> Rule {
        match self {
            Dialect::Hf => Rule::new("hf", 1, Some(2)),
            Dialect::Atom => Rule::new("atom", 0, Some(1)),
            Dialect::Xllm => Rule::new("xllm", 0, Some(0)),
            Dialect::Megatron => Rule::new("megatron", 1, None),
            Dialect::V4 => Rule { reads_offset: false, ..Rule::new("v4", 0, Some(1)).ordinal() },
            Dialect::V4Atom => {
                Rule { reads_offset: false, ..Rule::new("v4-atom", 0, Some(0)).ordinal() }
            }
            Dialect::M3 => Rule::new("m3", 0, Some(0)).ordinal(),
        }
    }

    /// The name used on the command line and in JSON.
    pub const fn name(self) -> &'static str {
        self.rule().name
    }

    /// The offset when the config gives none.
    pub const fn default_offset(self) -> Option<i64> {
        self.rule().default
    }

    /// The roles that `freq` and `offset` mean, not yet checked for order.
    pub(super) fn expand(
        self,
        freq: i64,
        offset: Option<i64>,
        indexers: &Indexers,
    ) -> Result<Vec<Role>> {
        let rule = self.rule();
        let name = rule.name;
        if freq < 1 {
            return Err(Error::config(format!(
                "index_topk_freq must be 1 or more (1 makes every layer Full), got {freq}"
            )));
        }
        let offset = match (offset, rule.default) {
            (Some(given), Some(fixed)) if !rule.reads_offset && given != fixed => {
                return Err(Error::config(format!(
                    "index_skip_topk_offset is {given}, but the {name} rule has no offset; remove it or name another dialect"
                )));
            }
            (Some(given), _) => given,
            (None, Some(default)) => default,
            (None, None) => {
                return Err(Error::config(format!(
                    "the {name} rule has no default offset (0 would make the first layer Shared); give index_skip_topk_offset"
                )));
            }
        };
        if offset < rule.base {
            return Err(Error::config(format!(
                "index_skip_topk_offset must be {} or more in the {name} rule, got {offset}",
                rule.base
            )));
        }
        let mut ordinal = 0;
        let role = |layer: usize| {
            if !indexers.bears(layer) {
                return Role::None;
            }
            let counted = if rule.ordinal { ordinal } else { layer as i64 };
            ordinal += 1;
            let x = counted + rule.base;
            if x.saturating_sub(offset).max(0) % freq == 0 { Role::Full } else { Role::Shared }
        };
        Ok((0..indexers.layers()).map(role).collect())
    }

    /// The numbers that mean exactly this pattern under this dialect, if any do: smallest frequency first, and
    /// the default offset before any other.
    pub fn express(self, pattern: &Pattern) -> Result<FreqOffset> {
        let rule = self.rule();
        let bears = pattern.roles().iter().map(|r| *r != Role::None).collect();
        let indexers = Indexers::exactly(bears)?;
        let counted: Vec<(i64, bool)> = pattern
            .roles()
            .iter()
            .enumerate()
            .filter(|(_, r)| **r != Role::None)
            .enumerate()
            .map(|(ordinal, (layer, role))| {
                let x = if rule.ordinal { ordinal } else { layer } as i64 + rule.base;
                (x, *role == Role::Full)
            })
            .collect();
        let usual = rule.default.unwrap_or(rule.base);
        let Some(first_shared) = counted.iter().find(|(_, full)| !full).map(|(x, _)| *x) else {
            return Ok(FreqOffset { freq: 1, offset: usual, dialect: self });
        };
        // Up to the offset everything is Full, and after it no two neighbours are.
        let leading = counted.windows(2).take_while(|w| w[1].0 < first_shared);
        let lowest = leading.filter(|w| w[0].0 + 1 == w[1].0).map(|w| w[1].0).last();
        let mut offsets: Vec<i64> = (lowest.unwrap_or(rule.base)..first_shared).collect();
        offsets.retain(|o| rule.reads_offset || *o == usual);
        offsets.sort_by_key(|o| *o != usual);
        let means = |freq: i64, offset: i64| {
            counted.iter().all(|(x, full)| ((x - offset).max(0) % freq == 0) == *full)
        };
        let last = indexers.layers() as i64 + rule.base;
        for freq in 2..=last {
            if let Some(offset) = offsets.iter().copied().find(|o| means(freq, *o)) {
                return Ok(FreqOffset { freq, offset, dialect: self });
            }
        }
        Err(Error::config(format!(
            "no index_topk_freq means this pattern in the {} dialect; export it as letters or indexer_types",
            rule.name
        )))
    }
}

/// A pattern as a frequency and an offset; meaningless without the dialect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FreqOffset {
    /// `index_topk_freq`.
    pub freq: i64,
    /// `index_skip_topk_offset`.
    pub offset: i64,
    /// Whose rule.
    pub dialect: Dialect,
}

impl fmt::Display for Dialect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Dialect {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|d| d.name() == text).ok_or_else(|| {
            let names: Vec<_> = Self::ALL.iter().map(|d| d.name()).collect();
            Error::config(format!(
                "dialect \"{}\" is not one of {}",
                text.escape_default(),
                names.join(", ")
            ))
        })
    }
}
