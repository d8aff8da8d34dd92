//! Plans: which layers select, which reuse, and everything that follows from it.
//!
//! A [`Plan`] is a [`Pattern`] and the [`Model`] it is for, with the facts derived once: the source of each
//! layer's indices, the slots of index K, what one pipeline stage must receive and send. It never changes, so it
//! can be shared. How other programs spell a pattern is in [`Spelling`] and [`Dialect`].

mod dialects;
mod export;
mod hf_config;
mod pattern;
mod stage;

pub use dialects::{Dialect, FreqOffset};
pub use export::ExportFormat;
pub use hf_config::HfOptions;
pub use pattern::{Indexers, MAX_LAYERS, Pattern, Role, Spelling};
pub use stage::Handoff;

use crate::error::{Error, Result};
use crate::fnv::Fnv;
use std::ops::Range;

/// Most positions an indexer may select for one row.
pub const MAX_TOPK: u32 = 4096;

/// Bound on blocks, pools, ratios and selections per row: their products stay far from overflow.
const MAX_RATIO: u32 = 4096;

/// How a row of index K is stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum IndexKFormat {
    /// fp8 e4m3 and one fp32 scale: `dim + 4` bytes.
    #[default]
    Fp8 = 0,
    /// bf16: `2 * dim` bytes.
    Bf16 = 1,
}

/// What a plan knows of its model besides the pattern. Dimensions that are not known are 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Model {
    /// Entries that the indexer selects for one row (blocks, where `block` is more than 1).
    pub topk: u32,
    /// Indexer heads.
    pub index_heads: u32,
    /// Dimension of an indexer head, and of a row of index K.
    pub index_head_dim: u32,
    /// How index K is stored.
    pub index_k: IndexKFormat,
    /// Attention heads.
    pub attention_heads: u32,
    /// Rank of the latent KV.
    pub kv_lora_rank: u32,
    /// Rotary dimensions beside the latent.
    pub rope_head_dim: u32,
    /// Positions that one selected entry names: 1, or the block of a block-selecting indexer.
    pub block: u32,
    /// Selections per row: 1, or the KV heads of a model that selects for each.
    pub selections: u32,
    /// Positions pooled into one row of index K (`index_kpool`).
    pub key_pool: u32,
    /// The incomplete pool at the end is always selected, `key_pool - 1` entries on top of `topk`.
    pub always_tail: bool,
    /// Attention has a learned sink per head.
    pub sink: bool,
    /// Draft (MTP) layers: ids from the number of decoder layers on, always Full.
    pub mtp_layers: u32,
    /// Draft step 0 selects and later draft steps reuse the draft layer's own indices, never the target's.
    pub mtp_shares: bool,
}

impl Model {
    /// A model of which only `topk` is known; index K is taken to be 128-dimensional, as everywhere so far.
    pub const fn new(topk: u32) -> Self {
        Self {
            topk,
            index_heads: 0,
            index_head_dim: 128,
            index_k: IndexKFormat::Fp8,
            attention_heads: 0,
            kv_lora_rank: 0,
            rope_head_dim: 0,
            block: 1,
            selections: 1,
            key_pool: 1,
            always_tail: false,
            sink: false,
            mtp_layers: 0,
            mtp_shares: false,
        }
    }

    /// int32 entries in one row of the index cache.
    pub const fn row_width(&self) -> u32 {
        let tail = if self.always_tail { self.key_pool - 1 } else { 0 };
        (self.topk + tail) * self.selections
    }

    /// Bytes of one row of index K.
    pub const fn index_k_row_bytes(&self) -> u32 {
        match self.index_k {
            IndexKFormat::Fp8 => self.index_head_dim + 4,
            IndexKFormat::Bf16 => self.index_head_dim * 2,
        }
    }

    fn check(&self) -> Result<()> {
        within("index_topk", self.topk, 1..=MAX_TOPK)?;
        within("index_head_dim", self.index_head_dim, 1..=4096)?;
        within("block", self.block, 1..=MAX_RATIO)?;
        within("selections", self.selections, 1..=MAX_RATIO)?;
        within("index_kpool", self.key_pool, 1..=MAX_RATIO)?;
        if self.always_tail && !self.topk.is_multiple_of(self.key_pool) {
            return Err(Error::config(format!(
                "index_topk ({}) must be a multiple of index_kpool ({})",
                self.topk, self.key_pool
            )));
        }
        Ok(())
    }
}

fn within(name: &str, value: u32, range: std::ops::RangeInclusive<u32>) -> Result<()> {
    if range.contains(&value) {
        return Ok(());
    }
    Err(Error::config(format!(
        "{name} must be from {} to {}, got {value}",
        range.start(),
        range.end()
    )))
}

/// Where a plan's pattern came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Origin {
    /// The field that decided.
    pub field: Field,
    /// Whose frequency rule, when a frequency decided.
    pub dialect: Option<Dialect>,
}

/// The field that decided a pattern.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Field {
    /// The caller's own argument.
    Argument = 0,
    /// `indexer_types`.
    IndexerTypes = 1,
    /// `index_topk_pattern`.
    TopkPattern = 2,
    /// `index_source_layer_ids`.
    SourceLayerIds = 3,
    /// `index_topk_freq`.
    TopkFreq = 4,
    /// No field asks for reuse, or what asks is switched off: every layer is Full.
    Default = 5,
}

impl Field {
    /// The config's name for it.
    pub const fn name(self) -> &'static str {
        match self {
            Field::Argument => "argument",
            Field::IndexerTypes => "indexer_types",
            Field::TopkPattern => "index_topk_pattern",
            Field::SourceLayerIds => "index_source_layer_ids",
            Field::TopkFreq => "index_topk_freq",
            Field::Default => "default",
        }
    }
}

/// Facts of one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layer {
    /// What it does.
    pub role: Role,
    /// The layer whose indices it attends with: itself when Full, `None` without sparse attention.
    pub source: Option<u32>,
    /// The layer whose index K its indexer scores: itself, except where a model shares index K between indexers.
    /// `None` unless Full.
    pub index_k_owner: Option<u32>,
    /// Compact number of that index K among those this stage holds.
    pub index_k_slot: Option<u32>,
    /// Positions that one selected entry names.
    pub block: u32,
    /// Positions that one row of index K stands for.
    pub key_pool: u32,
}

impl Layer {
    /// Whether `id`, whose facts these are, writes index K of its own.
    pub fn owns_index_k(&self, id: u32) -> bool {
        self.index_k_owner == Some(id)
    }
}

/// Layer-by-layer differences that only some models have.
#[derive(Clone, Debug, Default)]
pub(crate) struct Layout {
    /// Positions compressed into one KV entry, for each layer, draft layers included; empty means 1 throughout.
    /// A draft layer with 0 attends a window only and has no indexer.
    pub ratios: Vec<u32>,
    /// The layers that publish index K, ascending; empty means that each Full layer has its own.
    pub index_k_owners: Vec<u32>,
}

/// A resolved pattern for one model, or for one pipeline stage of it. Immutable.
///
/// Layer ids are the model's throughout: a stage of layers 20..40 calls its first layer 20. Draft (MTP) layers
/// follow the decoder layers, and the stage that runs them includes them in its range.
#[derive(Clone, Debug)]
pub struct Plan {
    model: Model,
    layout: Layout,
    /// Roles of all layers, those of other stages as this stage sees them.
    roles: Vec<Role>,
    layers: Vec<Layer>,
    decoder_layers: u32,
    stage: Range<u32>,
    /// Cut by [`Plan::slice`] with `promote`.
    promotes: bool,
    promoted: Option<u32>,
    index_k_layers: Vec<u32>,
    /// Fingerprint of the whole model, before any stage was cut.
    whole: u64,
    origin: Origin,
    inactive: Option<String>,
    notes: Vec<String>,
}

impl Plan {
    /// A plan for the whole model.
    pub fn new(pattern: Pattern, model: Model) -> Result<Self> {
        let origin = Origin { field: Field::Argument, dialect: None };
        Self::assemble(pattern, model, Layout::default(), origin)
    }

    pub(crate) fn assemble(
        pattern: Pattern,
        model: Model,
        layout: Layout,
        origin: Origin,
    ) -> Result<Self> {
        model.check()?;
        for ratio in layout.ratios.iter().filter(|r| **r != 0) {
            within("compress_ratios", *ratio, 1..=MAX_RATIO)?;
        }
        let decoder_layers = pattern.layers() as u32;
        let total = u64::from(decoder_layers) + u64::from(model.mtp_layers);
        if total > MAX_LAYERS as u64 {
            return Err(Error::config(format!(
                "{decoder_layers} layers and {} draft layers are more than {MAX_LAYERS}",
                model.mtp_layers
            )));
        }
        let mut roles = pattern.roles().to_vec();
        roles.extend((pattern.layers()..total as usize).map(|l| match layout.ratios.get(l) {
            Some(0) => Role::None,
            _ => Role::Full,
        }));
        let mut plan = Self {
            model,
            layout,
            roles,
            layers: Vec::new(),
            decoder_layers,
            stage: 0..total as u32,
            promotes: false,
            promoted: None,
            index_k_layers: Vec::new(),
            whole: 0,
            origin,
            inactive: None,
            notes: Vec::new(),
        };
        plan.derive()?;
        plan.whole = plan.fingerprint();
        Ok(plan)
    }

    /// The same plan, saying that its pattern came from elsewhere.
    pub fn with_origin(mut self, origin: Origin) -> Self {
        self.origin = origin;
        self
    }

    /// Fills in everything that follows from the roles and the stage.
    fn derive(&mut self) -> Result<()> {
        let mut full = None;
        self.layers.clear();
        self.index_k_layers.clear();
        for (id, role) in (0..).zip(&self.roles) {
            let ratio = self.ratio(id);
            if *role == Role::Full {
                full = Some(id);
            }
            let source = if *role == Role::None { None } else { full };
            let index_k_owner = match role {
                Role::Full => Some(self.owner(id)?),
                _ => None,
            };
            for (what, other) in [("indices", source), ("index K", index_k_owner)] {
                if let Some(other) = other.filter(|o| self.ratio(*o) != ratio) {
                    return Err(Error::config(format!(
                        "compress_ratios: layer {id} has ratio {ratio} but would use {what} of layer {other}, which has ratio {}; make layer {id} a source of its own",
                        self.ratio(other)
                    )));
                }
            }
            self.layers.push(Layer {
                role: *role,
                source,
                index_k_owner,
                index_k_slot: None,
                block: self.model.block * ratio,
                key_pool: self.model.key_pool * ratio,
            });
        }
        let held = |l: &Layer| l.index_k_owner;
        let (first, last) = (self.stage.start as usize, self.stage.end as usize);
        let mut owners: Vec<u32> =
            self.layers.get(first..last).unwrap_or_default().iter().filter_map(held).collect();
        owners.sort_unstable();
        owners.dedup();
        for layer in self.layers.get_mut(first..last).unwrap_or_default() {
            layer.index_k_slot =
                layer.index_k_owner.and_then(|o| owners.binary_search(&o).ok()).map(|s| s as u32);
        }
        self.index_k_layers = owners;
        Ok(())
    }

    fn ratio(&self, layer: u32) -> u32 {
        self.layout.ratios.get(layer as usize).copied().unwrap_or(1).max(1)
    }

    /// The layer whose index K the indexer of `layer` scores.
    fn owner(&self, layer: u32) -> Result<u32> {
        let owners = &self.layout.index_k_owners;
        if owners.is_empty() || layer >= self.decoder_layers {
            return Ok(layer);
        }
        owners.iter().rev().copied().find(|o| *o <= layer).ok_or_else(|| {
            Error::config(format!(
                "kv_source_layer_ids: layer {layer} runs an indexer, but no layer up to it publishes index K"
            ))
        })
    }

    /// What is known of the model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The layer ids this plan covers, draft layers included.
    pub fn stage(&self) -> Range<u32> {
        self.stage.clone()
    }

    /// Decoder layers of the whole model: draft layers have ids from here on.
    pub fn decoder_layers(&self) -> u32 {
        self.decoder_layers
    }

    /// Layers of the whole model, draft layers included.
    pub fn total_layers(&self) -> u32 {
        self.roles.len() as u32
    }

    /// Whether this is a stage of a model rather than all of it.
    pub fn is_stage(&self) -> bool {
        self.stage != (0..self.total_layers())
    }

    /// Facts of a layer of this stage.
    pub fn layer(&self, layer: u32) -> Result<&Layer> {
        let found = self.layers.get(layer as usize).filter(|_| self.stage.contains(&layer));
        found.ok_or_else(|| {
            let Range { start, end } = self.stage;
            Error::invalid("layer", format!("{start} to {} of this plan", end - 1), layer)
        })
    }

    /// Role of a layer. Draft layers are Full: reuse between draft steps is [`Plan::mtp_shares`].
    pub fn role(&self, layer: u32) -> Result<Role> {
        self.layer(layer).map(|l| l.role)
    }

    /// The layer whose indices `layer` attends with, f(l) = max{j <= l: F}; it may be on an earlier stage.
    pub fn source(&self, layer: u32) -> Result<Option<u32>> {
        self.layer(layer).map(|l| l.source)
    }

    /// Compact number of the index K that the indexer of `layer` scores; `None` unless the layer is Full.
    pub fn index_k_slot(&self, layer: u32) -> Result<Option<u32>> {
        self.layer(layer).map(|l| l.index_k_slot)
    }

    /// The layers whose index K this stage holds, ascending: slot `n` is the n-th of them. One before the stage's
    /// first layer is written by an earlier stage and has to be handed over, too.
    pub fn index_k_layers(&self) -> &[u32] {
        &self.index_k_layers
    }

    /// Later draft steps reuse the indices that the draft layer itself selected at draft step 0.
    pub fn mtp_shares(&self) -> bool {
        self.model.mtp_shares
    }

    /// Draft layers of this stage.
    pub fn mtp_layers(&self) -> u32 {
        self.stage.end.saturating_sub(self.stage.start.max(self.decoder_layers))
    }

    /// Roles of this stage's decoder layers.
    pub fn roles(&self) -> &[Role] {
        let end = self.stage.end.min(self.decoder_layers) as usize;
        self.roles.get(self.stage.start as usize..end).unwrap_or_default()
    }

    /// How many of this stage's decoder layers have this role; draft layers are not counted.
    pub fn count(&self, role: Role) -> u32 {
        self.roles().iter().filter(|r| **r == role).count() as u32
    }

    /// Bytes of index K that one token takes on this stage, over all layers. A fraction where rows are pooled
    /// oddly; exact otherwise.
    pub fn index_k_bytes_per_token(&self) -> f64 {
        self.index_k_layers.iter().map(|l| self.index_k_layer_bytes(*l)).sum()
    }

    /// Bytes of index K a token that this stage does without, compared to the same layers all Full.
    pub fn index_k_bytes_saved_per_token(&self) -> f64 {
        let sparse = self.stage.clone().filter(|l| self.role(*l).is_ok_and(|r| r != Role::None));
        sparse.map(|l| self.index_k_layer_bytes(l)).sum::<f64>() - self.index_k_bytes_per_token()
    }

    fn index_k_layer_bytes(&self, layer: u32) -> f64 {
        let pool = self.model.key_pool * self.ratio(layer);
        f64::from(self.model.index_k_row_bytes()) / f64::from(pool)
    }

    /// Bytes of one row of indices.
    pub fn row_bytes(&self) -> u64 {
        4 * u64::from(self.model.row_width())
    }

    /// Which field decided the pattern, and under which rule.
    pub fn origin(&self) -> Origin {
        self.origin
    }

    /// Why no layer is Shared although the config speaks of reuse: configured, but inactive. The first note says so, too.
    pub fn inactive(&self) -> Option<&str> {
        self.inactive.as_deref()
    }

    /// What a person should know: fields that were overruled, switched off, or assumed.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// A stable hash of all that this plan means on its stage, for prefix-cache and graph keys.
    ///
    /// FNV-1a, 64 bits, over little-endian u32: 1 (the encoding's version); topk, index heads, index head dim,
    /// index-K format, attention heads, latent rank, rotary dim, block, selections, key pool, always-tail, sink,
    /// mtp shares; decoder layers, all layers, first, last; source received and source sent (id + 1, or 0); then
    /// for each layer of the stage: role, source + 1, index-K owner + 1, positions an entry, positions a row.
    /// Neither the spelling a plan came from nor its notes take part.
    pub fn fingerprint(&self) -> u64 {
        let m = &self.model;
        let id = |layer: Option<u32>| layer.map_or(0, |l| l + 1);
        let crosses = |h: Option<Handoff>| id(h.map(|h| h.source));
        let head = [
            1,
            m.topk,
            m.index_heads,
            m.index_head_dim,
            m.index_k as u32,
            m.attention_heads,
            m.kv_lora_rank,
            m.rope_head_dim,
            m.block,
            m.selections,
            m.key_pool,
            u32::from(m.always_tail),
            u32::from(m.sink),
            u32::from(m.mtp_shares),
            self.decoder_layers,
            self.total_layers(),
            self.stage.start,
            self.stage.end,
            crosses(self.receive()),
            crosses(self.send()),
        ];
        let stage = self.stage.start as usize..self.stage.end as usize;
        let body =
            self.layers.get(stage).unwrap_or_default().iter().flat_map(|l| {
                [l.role as u32, id(l.source), id(l.index_k_owner), l.block, l.key_pool]
            });
        head.into_iter().chain(body).fold(Fnv::new(), Fnv::u32).0
    }

    /// [`Plan::fingerprint`] of the whole model, the same on all its stages: what two ends of a hand-off compare.
    /// Stages sliced with `promote` have another one than stages sliced without.
    pub fn model_fingerprint(&self) -> u64 {
        if self.promotes { Fnv(self.whole).u32(1).0 } else { self.whole }
    }
}
