//! A plan written out again.

use super::{Dialect, IndexKFormat, Pattern, Plan, Role};
use crate::error::{Error, Result};
use serde::Serialize;

/// A whole plan as JSON has it. Keys are a promise: others read them.
#[derive(Serialize)]
struct Report<'a> {
    pattern: String,
    source: &'static str,
    dialect: Option<&'static str>,
    inactive: Option<&'a str>,
    notes: &'a [String],
    layers: usize,
    full: u32,
    shared: u32,
    mtp_layers: u32,
    mtp_shares: bool,
    topk: u32,
    row_bytes: u64,
    index_heads: u32,
    index_head_dim: u32,
    index_k_format: &'static str,
    attention_heads: u32,
    kv_lora_rank: u32,
    rope_head_dim: u32,
    sink: bool,
    index_k_bytes_per_token: Number,
    index_k_bytes_saved_per_token: Number,
    index_k_layers: &'a [u32],
    fingerprint: String,
    model_fingerprint: String,
    stage: Stage,
    layer: Vec<LayerRow>,
}

#[derive(Serialize)]
struct Stage {
    first: u32,
    last: u32,
    receive_from_layer: Option<u32>,
    send_from_layer: Option<u32>,
    promoted: Option<u32>,
}

#[derive(Serialize)]
struct LayerRow {
    layer: u32,
    role: &'static str,
    draft: bool,
    source: Option<u32>,
    index_k_layer: Option<u32>,
    index_k_slot: Option<u32>,
    positions_per_index: u32,
    positions_per_index_k_row: u32,
}

/// Whole numbers without a fraction.
struct Number(f64);

impl Serialize for Number {
    fn serialize<S: serde::Serializer>(&self, s: S) -> std::result::Result<S::Ok, S::Error> {
        let Self(x) = *self;
        if x.fract() == 0.0 { s.serialize_u64(x as u64) } else { s.serialize_f64(x) }
    }
}

/// How [`Plan::export`] spells a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExportFormat {
    /// `index_topk_pattern`, one letter a layer; a stage's own layers for a stage.
    Letters,
    /// `index_topk_pattern`, one letter for each layer that has an indexer.
    Compact,
    /// `indexer_types`, a JSON list.
    IndexerTypes,
    /// The Full layers, a JSON list: `index_source_layer_ids`.
    SourceLayers,
    /// `index_topk_freq` and `index_skip_topk_offset`, a JSON object.
    Freq(Dialect),
    /// Everything that is resolved, a JSON object.
    Json,
}

impl Plan {
    /// The plan in somebody's spelling.
    pub fn export(&self, format: ExportFormat) -> Result<String> {
        let json = |v: serde_json::Value| v.to_string();
        Ok(match format {
            ExportFormat::Letters => self.letters(),
            ExportFormat::Compact => self.pattern()?.compact(),
            ExportFormat::IndexerTypes => json(serde_json::json!(self.pattern()?.indexer_types())),
            ExportFormat::SourceLayers => json(serde_json::json!(self.pattern()?.source_layers())),
            ExportFormat::Freq(dialect) => {
                let rule = dialect.express(&self.pattern()?)?;
                json(serde_json::json!({
                    "index_topk_freq": rule.freq,
                    "index_skip_topk_offset": rule.offset,
                }))
            }
            ExportFormat::Json => self.to_json()?,
        })
    }

    /// The letters of this stage's decoder layers.
    pub fn letters(&self) -> String {
        self.roles().iter().map(|r| r.letter()).collect()
    }

    /// The pattern, to be spelled in any way; a stage has none of its own.
    pub fn pattern(&self) -> Result<Pattern> {
        if self.is_stage() {
            let range = self.stage();
            return Err(Error::config(format!(
                "layers {}..{} are a stage, not a whole pattern; export the plan that it was cut from",
                range.start, range.end
            )));
        }
        Pattern::from_roles("pattern", self.roles().to_vec())
    }

    /// Everything that is resolved, as one JSON object.
    pub fn to_json(&self) -> Result<String> {
        let range = self.stage();
        let row = |id: u32| -> Result<LayerRow> {
            let layer = self.layer(id)?;
            Ok(LayerRow {
                layer: id,
                role: layer.role.name(),
                draft: id >= self.decoder_layers(),
                source: layer.source,
                index_k_layer: layer.index_k_owner,
                index_k_slot: layer.index_k_slot,
                positions_per_index: layer.block,
                positions_per_index_k_row: layer.key_pool,
            })
        };
        let model = self.model();
        let report = Report {
            pattern: self.letters(),
            source: self.origin().field.name(),
            dialect: self.origin().dialect.map(|d| d.name()),
            inactive: self.inactive(),
            notes: self.notes(),
            layers: self.roles().len(),
            full: self.count(Role::Full),
            shared: self.count(Role::Shared),
            mtp_layers: self.mtp_layers(),
            mtp_shares: self.mtp_shares(),
            topk: model.topk,
            row_bytes: self.row_bytes(),
            index_heads: model.index_heads,
            index_head_dim: model.index_head_dim,
            index_k_format: match model.index_k {
                IndexKFormat::Fp8 => "fp8",
                IndexKFormat::Bf16 => "bf16",
            },
            attention_heads: model.attention_heads,
            kv_lora_rank: model.kv_lora_rank,
            rope_head_dim: model.rope_head_dim,
            sink: model.sink,
            index_k_bytes_per_token: Number(self.index_k_bytes_per_token()),
            index_k_bytes_saved_per_token: Number(self.index_k_bytes_saved_per_token()),
            index_k_layers: self.index_k_layers(),
            fingerprint: format!("{:016x}", self.fingerprint()),
            model_fingerprint: format!("{:016x}", self.model_fingerprint()),
            stage: Stage {
                first: range.start,
                last: range.end,
                receive_from_layer: self.receive().map(|h| h.source),
                send_from_layer: self.send().map(|h| h.source),
                promoted: self.promoted(),
            },
            layer: range.map(row).collect::<Result<_>>()?,
        };
        serde_json::to_string_pretty(&report)
            .map_err(|e| Error::config(format!("the plan could not be written as JSON: {e}")))
    }
}
