//! What a decoder's stages have to compute and to read, from the fields of its config.json.

use crate::Failure;
use indexcache::plan::{self, IndexKFormat, Plan, Role};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// A part of a step that is timed by itself. Together they are the step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// A Full layer's indexer up to its scores: projections, norm, RoPE, quantising, index-K write.
    Indexer,
    /// Scores and top-k.
    Select,
    /// Sparse attention.
    Attend,
    /// The rest of attention, which every layer has.
    Projections,
    Moe,
    DenseMlp,
    /// Embedding, last norm, LM head: once a step.
    Head,
}

impl Stage {
    pub const ALL: [Stage; 7] = [
        Stage::Indexer,
        Stage::Select,
        Stage::Attend,
        Stage::Projections,
        Stage::Moe,
        Stage::DenseMlp,
        Stage::Head,
    ];

    /// As the file of times spells it.
    pub fn name(self) -> &'static str {
        match self {
            Stage::Indexer => "indexer",
            Stage::Select => "select",
            Stage::Attend => "attend",
            Stage::Projections => "projections",
            Stage::Moe => "moe",
            Stage::DenseMlp => "dense_mlp",
            Stage::Head => "head",
        }
    }

    /// Its time may depend on whose kernels run.
    pub fn has_kernels(self) -> bool {
        matches!(self, Stage::Indexer | Stage::Select | Stage::Attend)
    }

    /// Its time follows the context.
    pub fn over_context(self) -> bool {
        matches!(self, Stage::Select | Stage::Attend)
    }
}

/// The rows of one call: the last `queries` positions of each of `requests` requests of `context` positions.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    pub requests: f64,
    pub queries: f64,
    pub context: f64,
}

impl Call {
    pub fn rows(self) -> f64 {
        self.requests * self.queries
    }

    /// Sum over rows of the positions that each sees, at most `cap` of them.
    fn positions(self, cap: f64) -> f64 {
        let unseen = self.context - self.queries;
        let full = cap.clamp(unseen, self.context);
        let rising = (full * (full + 1.0) - unseen * (unseen + 1.0)) / 2.0;
        let capped = if full < self.context { (self.context - full) * cap } else { 0.0 };
        self.requests * (rising + capped)
    }
}

/// What a stage has to do at least.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Work {
    pub fp8_flop: f64,
    pub bf16_flop: f64,
    pub bytes: f64,
}

/// Rates that simple kernels reached on the card.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ceilings {
    read_gb_s: f64,
    fp8_tflop_s: f64,
    bf16_tflop_s: f64,
}

impl Ceilings {
    pub fn are_positive(&self) -> bool {
        [self.read_gb_s, self.fp8_tflop_s, self.bf16_tflop_s].iter().all(|rate| *rate > 0.0)
    }

    /// The time that `work` takes at these rates: its roofline.
    pub fn microseconds(&self, work: Work) -> f64 {
        let compute =
            work.fp8_flop / self.fp8_tflop_s / 1e6 + work.bf16_flop / self.bf16_tflop_s / 1e6;
        compute.max(work.bytes / self.read_gb_s / 1e3)
    }
}

/// What attention reads on a layer.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Reads {
    /// The selected positions.
    Selected,
    /// Every so many positions, compressed into one.
    Compressed(f64),
    /// Every position.
    All,
    /// Nothing that grows with the context: a window, or linear attention's state.
    Nothing,
}

/// What tells a layer's work from another's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Layer {
    pub role: Role,
    pub dense: bool,
    /// Positions that one row of index K stands for.
    key_pool: f64,
    /// Positions that one row of KV stands for.
    ratio: f64,
    /// Most keys that are scored, where an earlier layer has chosen candidates.
    candidates: f64,
    reads: Reads,
}

impl Layer {
    /// As a model has it that neither pools nor compresses.
    pub const PLAIN: Layer = Layer {
        role: Role::Full,
        dense: false,
        key_pool: 1.0,
        ratio: 1.0,
        candidates: f64::INFINITY,
        reads: Reads::Selected,
    };

    /// Whether it is of the kind that is timed.
    pub fn is_plain(&self) -> bool {
        *self == Layer { role: self.role, dense: self.dense, ..Layer::PLAIN }
            && self.role != Role::None
    }

    /// Whether it spends time on `stage`.
    pub fn has(&self, stage: Stage) -> bool {
        match stage {
            Stage::Indexer | Stage::Select => self.role == Role::Full,
            Stage::Attend | Stage::Projections => true,
            Stage::Moe => !self.dense,
            Stage::DenseMlp => self.dense,
            Stage::Head => false,
        }
    }

    /// The rows of a cache that `stage` looks through.
    pub fn length(&self, stage: Stage, context: f64) -> f64 {
        match stage {
            Stage::Select => (context / self.key_pool).min(self.candidates),
            _ => context / self.ratio,
        }
    }
}

/// Sizes among a config's fields.
struct Fields<'a>(&'a Map<String, Value>);

impl Fields<'_> {
    fn size(&self, key: &str) -> Result<Option<f64>, Failure> {
        match self.0.get(key).filter(|value| !value.is_null()) {
            None => Ok(None),
            Some(value) => match value.as_u64().filter(|size| *size <= 1 << 24) {
                Some(size) => Ok(Some(size as f64)),
                None => Err(Failure::Refused(format!("{key} must be a size, got {value}"))),
            },
        }
    }

    /// Under the first of these names that is there and not 0.
    fn first(&self, keys: &[&str]) -> Result<Option<f64>, Failure> {
        for key in keys {
            if let Some(size) = self.size(key)?.filter(|size| *size > 0.0) {
                return Ok(Some(size));
            }
        }
        Ok(None)
    }

    fn need(&self, key: &str) -> Result<f64, Failure> {
        self.first(&[key])?.ok_or_else(|| missing(key))
    }
}

/// A decoder's dimensions, on one of the GPUs that share it.
#[derive(Clone, Debug)]
pub struct Shape {
    pub index_heads: f64,
    /// Entries that are selected for a row.
    pub topk: f64,
    index_dim: f64,
    index_k_bytes: f64,
    index_k_fp8: bool,
    /// Positions that one selected entry names.
    block: f64,
    pub attention: Attention,
    hidden: f64,
    /// Weights of an indexer, of a dense MLP, of an expert, of the shared experts together, of the router, of the head.
    indexer: f64,
    dense: f64,
    expert: f64,
    shared: f64,
    router: f64,
    head: f64,
    experts: f64,
    experts_per_row: f64,
    /// Weights are fp8, but for the head's.
    fp8: bool,
}

#[derive(Clone, Debug)]
pub struct Attention {
    pub heads: f64,
    /// Dimensions of a head's scores and values.
    score_dim: f64,
    value_dim: f64,
    /// Of one row of KV.
    kv_bytes: f64,
    /// Positions attended to beside the selected.
    window: f64,
    /// Weights.
    projections: f64,
}

impl Attention {
    fn new(config: &Fields<'_>, hidden: f64, tp: f64) -> Result<Self, Failure> {
        let all = config.need("num_attention_heads")?;
        if all % tp != 0.0 {
            let why = format!("--tp {tp} does not divide num_attention_heads, {all}");
            return Err(Failure::Usage(why));
        }
        let heads = all / tp;
        // What queries are projected from, and the weights that make it.
        let latent = config.first(&["q_lora_rank"])?;
        let (from, down) = latent.map_or((hidden, 0.0), |rank| (rank, hidden * rank));
        let rope = config.size("qk_rope_head_dim")?.unwrap_or(0.0);
        if let Some(rank) = config.first(&["kv_lora_rank"])? {
            let (nope, value) = (config.need("qk_nope_head_dim")?, config.need("v_head_dim")?);
            let head = from * (nope + rope) + rank * (nope + value) + value * hidden;
            return Ok(Attention {
                heads,
                score_dim: rank + rope,
                value_dim: rank,
                kv_bytes: rank + 4.0 * (rank / 128.0).ceil() + 2.0 * rope,
                window: 0.0,
                projections: down + hidden * (rank + rope) + heads * head,
            });
        }
        let dim = config.need("head_dim")?;
        if let Some(out) = config.first(&["o_lora_rank"])? {
            // Each group of heads has an output of its own rank.
            let outputs = heads * dim * out + config.need("o_groups")? / tp * out * hidden;
            return Ok(Attention {
                heads,
                score_dim: dim,
                value_dim: dim,
                kv_bytes: dim + rope + 8.0,
                window: config.size("sliding_window")?.unwrap_or(0.0),
                projections: down + hidden * dim + heads * from * dim + outputs,
            });
        }
        let kv_heads = (config.need("num_key_value_heads")? / tp).max(1.0);
        Ok(Attention {
            heads,
            score_dim: dim,
            value_dim: dim,
            kv_bytes: 2.0 * 2.0 * kv_heads * dim,
            window: 0.0,
            projections: down + 2.0 * hidden * kv_heads * dim + heads * dim * (from + hidden),
        })
    }
}

impl Shape {
    /// One of `tp` GPUs' part. Attention heads, the widths of experts and MLPs, and the vocabulary are divided among
    /// them; the indexer, what is projected to latents, and the router are not.
    pub fn new(fields: &Map<String, Value>, model: &plan::Model, tp: f64) -> Result<Self, Failure> {
        let config = Fields(fields);
        let hidden = config.need("hidden_size")?;
        let attention = Attention::new(&config, hidden, tp)?;
        let (index_heads, index_dim) =
            (f64::from(model.index_heads), f64::from(model.index_head_dim));
        if index_heads == 0.0 {
            return Err(missing("index_n_heads"));
        }
        let queries = config.first(&["q_lora_rank"])?.unwrap_or(hidden);
        let experts = config.first(&EXPERTS)?.unwrap_or(0.0);
        let width = config.first(&["intermediate_size"])?;
        let (mut expert, mut experts_per_row) = (0.0, 0.0);
        if experts > 0.0 {
            let width = config.first(&["moe_intermediate_size"])?.or(width);
            expert = 3.0 * hidden * width.ok_or_else(|| missing("moe_intermediate_size"))? / tp;
            experts_per_row = config.need("num_experts_per_tok")?.min(experts);
        }
        let shared = config.first(&["n_shared_experts", "num_shared_experts"])?.unwrap_or(0.0);
        Ok(Shape {
            index_heads,
            topk: f64::from(model.topk),
            index_dim,
            index_k_bytes: f64::from(model.index_k_row_bytes()),
            index_k_fp8: model.index_k == IndexKFormat::Fp8,
            block: f64::from(model.block),
            attention,
            hidden,
            indexer: queries * index_heads * index_dim + hidden * (index_dim + index_heads),
            dense: 3.0 * hidden * width.unwrap_or(0.0) / tp,
            expert,
            shared: shared * expert,
            router: hidden * experts,
            head: hidden * config.need("vocab_size")? / tp,
            experts,
            experts_per_row,
            fp8: weights(fields) == Some("fp8"),
        })
    }

    /// Whether the config gives this stage's size.
    pub fn has(&self, stage: Stage) -> bool {
        match stage {
            Stage::Moe => self.experts > 0.0,
            Stage::DenseMlp => self.dense > 0.0,
            _ => true,
        }
    }

    /// The least that `stage` of `layer` has to do for `call`.
    pub fn work(&self, stage: Stage, layer: &Layer, call: Call) -> Work {
        let rows = call.rows();
        let all = |weights| self.multiply(rows, weights, weights);
        match stage {
            Stage::Indexer => all(self.indexer),
            Stage::Select => self.select(layer, call),
            Stage::Attend => self.attend(layer, call),
            Stage::Projections => all(self.attention.projections),
            Stage::DenseMlp => all(self.dense),
            Stage::Moe => {
                let always = self.shared + self.router;
                // Rows that choose evenly and each for itself leave so many experts out.
                let untouched = (1.0 - self.experts_per_row / self.experts).powf(rows);
                let touched = self.experts * (1.0 - untouched);
                let used = always + self.experts_per_row * self.expert;
                self.multiply(rows, used, always + touched * self.expert)
            }
            Stage::Head => Work {
                fp8_flop: 0.0,
                bf16_flop: 2.0 * call.requests * self.head,
                bytes: 2.0 * self.head,
            },
        }
    }

    /// A product of each row with `used` weights; over all rows, `read` weights are needed.
    fn multiply(&self, rows: f64, used: f64, read: f64) -> Work {
        let (flop, activations) = (2.0 * rows * used, 2.0 * 2.0 * rows * self.hidden);
        match self.fp8 {
            true => Work { fp8_flop: flop, bf16_flop: 0.0, bytes: read + activations },
            false => Work { fp8_flop: 0.0, bf16_flop: flop, bytes: 2.0 * read + activations },
        }
    }

    fn select(&self, layer: &Layer, call: Call) -> Work {
        let keys = call.positions(layer.candidates * layer.key_pool) / layer.key_pool;
        let flop = 2.0 * self.index_heads * self.index_dim * keys;
        let read = call.requests * layer.length(Stage::Select, call.context) * self.index_k_bytes;
        let row = self.index_heads * self.index_dim + 4.0 * self.topk;
        let bytes = read + call.rows() * row;
        match self.index_k_fp8 {
            true => Work { fp8_flop: flop, bf16_flop: 0.0, bytes },
            false => Work { fp8_flop: 0.0, bf16_flop: flop, bytes },
        }
    }

    fn attend(&self, layer: &Layer, call: Call) -> Work {
        let all = call.positions(f64::INFINITY);
        let grown = match layer.reads {
            Reads::Selected => call.positions(self.topk * self.block * layer.ratio) / layer.ratio,
            Reads::Compressed(ratio) => all / ratio,
            Reads::All => all,
            Reads::Nothing => 0.0,
        };
        let pairs = grown + call.positions(self.attention.window);
        let dims = self.attention.heads * (self.attention.score_dim + self.attention.value_dim);
        // A row of KV that many rows attend to is read once at least.
        let rows_of_kv = pairs.min(call.requests * call.context);
        Work {
            fp8_flop: 0.0,
            bf16_flop: 2.0 * dims * pairs,
            bytes: rows_of_kv * self.attention.kv_bytes + 2.0 * call.rows() * dims,
        }
    }
}

const EXPERTS: [&str; 3] = ["n_routed_experts", "num_local_experts", "num_experts"];

/// Why a config cannot be simulated.
pub fn missing(key: &str) -> Failure {
    Failure::Refused(format!("{key} is missing: without it the time of a layer is not known"))
}

/// How the config says that weights are quantised.
pub fn weights(fields: &Map<String, Value>) -> Option<&str> {
    fields.get("quantization_config")?.get("quant_method")?.as_str()
}

/// The decoder layers of `plan`, which was read from `fields`.
pub fn layers(plan: &Plan, fields: &Map<String, Value>) -> Result<Vec<Layer>, Failure> {
    let config = Fields(fields);
    let all_dense = config.first(&EXPERTS)?.is_none();
    let first_dense = config.size("first_k_dense_replace")?.unwrap_or(0.0);
    let source = fields.get("candidate_source_layer_id").and_then(Value::as_u64);
    let most = match source {
        Some(_) => config.need("candidate_topk_blocks")? * config.need("candidate_block_size")?,
        None => f64::INFINITY,
    };
    let linear = fields.contains_key("linear_attn_config");
    let one = |id: u32| -> Result<Layer, Failure> {
        let facts = plan.layer(id)?;
        let entry = |key| fields.get(key).and_then(|list| list.get(id as usize));
        let is = |key, what: &str| entry(key).is_some_and(|entry| entry == what);
        let reads = match (facts.role, entry("compress_ratios").map(Value::as_f64)) {
            (Role::Full | Role::Shared, _) => Reads::Selected,
            (Role::None, Some(Some(ratio))) if ratio > 0.0 => Reads::Compressed(ratio),
            (Role::None, Some(_)) => Reads::Nothing,
            (Role::None, None) if linear || is("layer_types", "linear_attention") => Reads::Nothing,
            (Role::None, None) => Reads::All,
        };
        let by_candidates = source.is_some_and(|source| u64::from(id) > source);
        Ok(Layer {
            role: facts.role,
            dense: all_dense
                || f64::from(id) < first_dense
                || is("mlp_layer_types", "dense")
                || entry("moe_layer_freq").is_some_and(|experts| experts == 0),
            key_pool: f64::from(facts.key_pool),
            ratio: f64::from(facts.block / plan.model().block),
            candidates: if by_candidates { most } else { f64::INFINITY },
            reads,
        })
    };
    (0..plan.decoder_layers()).map(one).collect()
}
