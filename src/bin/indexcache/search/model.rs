//! The tiny model on the CPU: what a row of text costs under a pattern.
//!
//! `examples/tiny_dsa/README.md` has the forward pass in formulas, with the names used here. Selection, attention and
//! every rounding are this library's operations; the rest is matrix products and norms in f32. Activations are dense,
//! one token after the other. A row runs on one thread, so its loss has the same bits whatever else runs.

use half::bf16;
use indexcache::context::{BackendChoice, Context, Stream};
use indexcache::error::{Error, Result, Status};
use indexcache::ops::*;
use indexcache::plan::{Pattern, Role};
use indexcache::tensor::{F8E4M3, Tensor};
use ndarray::linalg::general_mat_mul;
use ndarray::{ArrayView2, ArrayView3, ArrayViewMut2, ArrayViewMut3, ShapeError, s};
use safetensors::{Dtype, SafeTensors};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// The key norm's epsilon, which no config states.
const K_NORM_EPS: f32 = 1e-6;
/// Largest size of anything, so that no config can ask for all memory.
const MAX_SIZE: usize = 1 << 16;

/// What of `config.json` decides the forward pass.
#[derive(Debug, Deserialize, Serialize)]
pub struct Config {
    num_hidden_layers: usize,
    hidden_size: usize,
    intermediate_size: usize,
    vocab_size: usize,
    num_attention_heads: usize,
    q_lora_rank: usize,
    kv_lora_rank: usize,
    qk_nope_head_dim: usize,
    qk_rope_head_dim: usize,
    v_head_dim: usize,
    index_n_heads: usize,
    index_head_dim: usize,
    index_topk: usize,
    max_position_embeddings: usize,
    rope_theta: f64,
    rms_norm_eps: f32,
    first_k_dense_replace: usize,
    tie_word_embeddings: bool,
    rope_interleave: bool,
    indexer_rope_interleave: bool,
    hidden_act: String,
}

impl Config {
    /// Refuses what would silently be computed differently. Sizes are checked against the weights.
    fn read(json: &[u8]) -> Result<Self> {
        let c: Self = serde_json::from_slice(json)
            .map_err(|e| Error::config(format!("config.json: not a tiny DSA model's: {e}")))?;
        for (key, got) in [
            ("num_hidden_layers", c.num_hidden_layers),
            ("hidden_size", c.hidden_size),
            ("intermediate_size", c.intermediate_size),
            ("num_attention_heads", c.num_attention_heads),
            ("q_lora_rank", c.q_lora_rank),
            ("kv_lora_rank", c.kv_lora_rank),
            ("qk_nope_head_dim", c.qk_nope_head_dim),
            ("qk_rope_head_dim", c.qk_rope_head_dim),
            ("v_head_dim", c.v_head_dim),
            ("index_n_heads", c.index_n_heads),
            ("index_head_dim", c.index_head_dim),
            ("index_topk", c.index_topk),
            ("max_position_embeddings", c.max_position_embeddings),
        ] {
            let in_range = (1..=MAX_SIZE).contains(&got);
            require(key, in_range, format_args!("1 to {MAX_SIZE}"), got)?;
        }
        for (key, got) in
            [("rope_theta", c.rope_theta), ("rms_norm_eps", f64::from(c.rms_norm_eps))]
        {
            require(key, got.is_finite() && got > 0.0, "a finite, positive number", got)?;
        }
        for (key, got) in [
            ("tie_word_embeddings", c.tie_word_embeddings),
            ("rope_interleave", c.rope_interleave),
            ("indexer_rope_interleave", c.indexer_rope_interleave),
        ] {
            require(key, got, true, got)?;
        }
        require("hidden_act", c.hidden_act == "silu", "silu", &c.hidden_act)?;
        // Tokens are bytes.
        require("vocab_size", c.vocab_size == 256, 256, c.vocab_size)?;
        // No experts.
        let (dense, layers) = (c.first_k_dense_replace, c.num_hidden_layers);
        require("first_k_dense_replace", dense == layers, layers, dense)?;
        let rope = c.qk_rope_head_dim;
        let fits = rope.is_multiple_of(2) && rope <= c.index_head_dim;
        require("qk_rope_head_dim", fits, "an even number up to index_head_dim", rope)?;
        Ok(c)
    }

    /// An attention head of a query: the part without position, then the rotated one.
    fn qk(&self) -> usize {
        self.qk_nope_head_dim + self.qk_rope_head_dim
    }

    /// A token's KV row: latent, then the rotated part.
    fn kv_row(&self) -> usize {
        self.kv_lora_rank + self.qk_rope_head_dim
    }
}

fn require(
    key: &str,
    holds: bool,
    want: impl std::fmt::Display,
    got: impl std::fmt::Display,
) -> Result<()> {
    if holds {
        return Ok(());
    }
    Err(Error::config(format!("config.json: {key}: expected {want}, got {got}")))
}

/// `weight` is `[out, inner]`, as stored.
struct Linear {
    weight: Vec<f32>,
    out: usize,
    inner: usize,
}

impl Linear {
    fn apply(&self, x: &[f32]) -> Result<Vec<f32>> {
        let rows = x.len() / self.inner;
        let mut y = vec![0.0; rows * self.out];
        let x = ArrayView2::from_shape((rows, self.inner), x).map_err(shape)?;
        let w = ArrayView2::from_shape((self.out, self.inner), &self.weight).map_err(shape)?;
        let mut out = ArrayViewMut2::from_shape((rows, self.out), &mut y).map_err(shape)?;
        general_mat_mul(1.0, &x, &w.t(), 0.0, &mut out);
        Ok(y)
    }
}

fn shape(error: ShapeError) -> Error {
    Error::new(Status::Panic, format!("a matrix product: {error}"))
}

struct Indexer {
    wq_b: Linear,
    wk: Linear,
    weights_proj: Linear,
    k_norm_weight: Vec<f32>,
    k_norm_bias: Vec<f32>,
}

struct Layer {
    input_norm: Vec<f32>,
    post_norm: Vec<f32>,
    q_norm: Vec<f32>,
    kv_norm: Vec<f32>,
    q_a: Linear,
    q_b: Linear,
    kv_a: Linear,
    /// `[heads, nope + value, latent]`: W_uk, then W_uv.
    kv_b: Vec<f32>,
    o: Linear,
    indexer: Indexer,
    gate: Linear,
    up: Linear,
    down: Linear,
}

/// Tensors of `model.safetensors` by name and shape.
struct Weights<'a>(SafeTensors<'a>);

impl Weights<'_> {
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let file = |what: String| Error::config(format!("model.safetensors: {what}"));
        let tensor = self.0.tensor(name).map_err(|e| file(e.to_string()))?;
        if (tensor.dtype(), tensor.shape()) != (Dtype::BF16, shape) {
            let (dtype, got) = (tensor.dtype(), tensor.shape());
            return Err(file(format!("{name}: expected BF16 {shape:?}, got {dtype:?} {got:?}")));
        }
        let pairs = tensor.data().chunks_exact(2);
        Ok(pairs.map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect())
    }

    fn norm(&self, name: &str, width: usize) -> Result<Vec<f32>> {
        self.tensor(&format!("{name}.weight"), &[width])
    }

    fn linear(&self, name: &str, out: usize, inner: usize) -> Result<Linear> {
        let weight = self.tensor(&format!("{name}.weight"), &[out, inner])?;
        Ok(Linear { weight, out, inner })
    }

    fn layer(&self, name: &str, c: &Config) -> Result<Layer> {
        let (attention, mlp) = (format!("{name}.self_attn"), format!("{name}.mlp"));
        let indexer = format!("{attention}.indexer");
        let (d, inner, latent, dim) =
            (c.hidden_size, c.intermediate_size, c.q_lora_rank, c.index_head_dim);
        let linear =
            |name: &str, out, inner| self.linear(&format!("{attention}.{name}"), out, inner);
        let kv_b_rows = c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim);
        Ok(Layer {
            input_norm: self.norm(&format!("{name}.input_layernorm"), d)?,
            post_norm: self.norm(&format!("{name}.post_attention_layernorm"), d)?,
            q_norm: self.norm(&format!("{attention}.q_a_layernorm"), latent)?,
            kv_norm: self.norm(&format!("{attention}.kv_a_layernorm"), c.kv_lora_rank)?,
            q_a: linear("q_a_proj", latent, d)?,
            q_b: linear("q_b_proj", c.num_attention_heads * c.qk(), latent)?,
            kv_a: linear("kv_a_proj_with_mqa", c.kv_row(), d)?,
            kv_b: linear("kv_b_proj", kv_b_rows, c.kv_lora_rank)?.weight,
            o: linear("o_proj", d, c.num_attention_heads * c.v_head_dim)?,
            indexer: Indexer {
                wq_b: linear("indexer.wq_b", c.index_n_heads * dim, latent)?,
                wk: linear("indexer.wk", dim, d)?,
                weights_proj: linear("indexer.weights_proj", c.index_n_heads, d)?,
                k_norm_weight: self.norm(&format!("{indexer}.k_norm"), dim)?,
                k_norm_bias: self.tensor(&format!("{indexer}.k_norm.bias"), &[dim])?,
            },
            gate: self.linear(&format!("{mlp}.gate_proj"), inner, d)?,
            up: self.linear(&format!("{mlp}.up_proj"), inner, d)?,
            down: self.linear(&format!("{mlp}.down_proj"), d, inner)?,
        })
    }
}

/// Weights, and all else that does not depend on the text.
pub struct Model {
    config: Config,
    embedding: Linear,
    norm: Vec<f32>,
    layers: Vec<Layer>,
    /// Cosine and sine, `[positions, rope / 2]`.
    rope: Vec<(f32, f32)>,
    /// Of one thread: what runs in parallel are rows.
    context: Context,
}

/// A row of text at the input of a layer.
#[derive(Clone)]
struct State {
    hidden: Vec<f32>,
    /// `[tokens, topk]` of the nearest Full layer before.
    selection: Arc<Vec<i32>>,
}

/// A row's states behind its first layers. They depend on nothing but the roles of those layers, so that patterns
/// which begin alike share them.
#[derive(Default)]
pub struct Prefix {
    roles: Vec<Role>,
    /// `[l]` is behind layer `l`.
    states: Vec<State>,
}

impl Prefix {
    /// How many layers of a pattern need not run.
    pub fn shared(&self, pattern: &Pattern) -> usize {
        self.roles.iter().zip(pattern.roles()).take_while(|(a, b)| a == b).count()
    }

    /// `[tokens, topk]`: the indices that each of the layers attended to.
    pub fn selections(&self) -> impl Iterator<Item = &[i32]> {
        self.states.iter().map(|state| state.selection.as_slice())
    }
}

/// Where the keys of a row are: token `t` in slot `t`.
struct Slots {
    table: Vec<i32>,
    numbers: Vec<i32>,
    ends: Vec<i32>,
}

impl Slots {
    /// `tokens` is at most `MAX_SIZE`.
    fn of(tokens: usize) -> Self {
        let count = |n: usize| (0..n as i32).collect();
        let ends = (1..=tokens as i32).collect();
        Slots { table: count(tokens.div_ceil(PAGE)), numbers: count(tokens), ends }
    }

    fn tensor(&self) -> Result<Tensor<'_>> {
        Tensor::from_slice("slots", &self.numbers, &[self.numbers.len()])
    }

    fn map(&self) -> Result<KeyMapArgs<'_>> {
        let table = Tensor::from_slice("block_table", &self.table, &[1, self.table.len()])?;
        let ends = Tensor::from_slice("row_end", &self.ends, &[self.ends.len()])?;
        Ok(KeyMapArgs { block_table: Some(table), row_end: Some(ends), ..KeyMapArgs::default() })
    }
}

impl Model {
    /// From the contents of `config.json` and `model.safetensors`.
    pub fn load(config: &[u8], weights: &[u8]) -> Result<Self> {
        let config = Config::read(config)?;
        let weights = SafeTensors::deserialize(weights)
            .map_err(|e| Error::config(format!("model.safetensors: {e}")))?;
        let weights = Weights(weights);
        let layer = |l| weights.layer(&format!("model.layers.{l}"), &config);
        Ok(Model {
            embedding: weights.linear(
                "model.embed_tokens",
                config.vocab_size,
                config.hidden_size,
            )?,
            norm: weights.norm("model.norm", config.hidden_size)?,
            layers: (0..config.num_hidden_layers).map(layer).collect::<Result<_>>()?,
            rope: rope_table(&config),
            context: Context::new(BackendChoice::Cpu, 1, || ())?,
            config,
        })
    }

    /// What of `config.json` decides the forward pass.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Number of layers.
    pub fn layers(&self) -> usize {
        self.layers.len()
    }

    /// Indices a token.
    pub fn topk(&self) -> usize {
        self.config.index_topk
    }

    /// Longest row of text.
    pub fn context_length(&self) -> usize {
        self.config.max_position_embeddings
    }

    /// The bits that `text` costs after its first byte; its last byte is predicted and not read. Starts behind the
    /// layers that `prefix` has for `pattern`, and leaves at least `keep` of them there.
    pub fn bits(
        &self,
        text: &[u8],
        pattern: &Pattern,
        prefix: &mut Prefix,
        keep: usize,
    ) -> Result<f64> {
        let roles = pattern.roles();
        if roles.len() != self.layers() || roles.contains(&Role::None) {
            let want = format_args!("{} letters, F or S", self.layers());
            return Err(Error::invalid("pattern", want, pattern));
        }
        let read = match text.split_last() {
            Some((_, read)) if (1..self.context_length()).contains(&read.len()) => read,
            _ => {
                let want = format_args!("2 to {} bytes", self.context_length());
                return Err(Error::invalid("text", want, text.len()));
            }
        };
        let shared = prefix.shared(pattern);
        if keep > shared {
            prefix.roles.truncate(shared);
            prefix.states.truncate(shared);
        }
        let slots = Slots::of(read.len());
        let mut state = match shared.checked_sub(1).and_then(|l| prefix.states.get(l)) {
            Some(state) => state.clone(),
            None => self.embed(read),
        };
        for (l, layer) in self.layers.iter().enumerate().skip(shared) {
            self.layer(layer, roles[l], &slots, &mut state)?;
            if l < keep {
                prefix.roles.push(roles[l]);
                prefix.states.push(state.clone());
            }
        }
        self.score(text, state.hidden)
    }

    fn embed(&self, text: &[u8]) -> State {
        let Linear { weight, inner, .. } = &self.embedding;
        let rows = text.iter().map(|byte| &weight[usize::from(*byte) * inner..][..*inner]);
        // Layer 0 is Full: nobody reads this selection.
        State { hidden: rows.flatten().copied().collect(), selection: Arc::default() }
    }

    fn layer(&self, layer: &Layer, role: Role, slots: &Slots, state: &mut State) -> Result<()> {
        let eps = self.config.rms_norm_eps;
        let x = rms_norm(state.hidden.clone(), &layer.input_norm, eps);
        let cq = rms_norm(layer.q_a.apply(&x)?, &layer.q_norm, eps);
        if role == Role::Full {
            state.selection = Arc::new(self.select(&layer.indexer, slots, &x, &cq)?);
        }
        let q = self.absorbed_queries(layer, &cq)?;
        let kv = self.kv_rows(layer, &x)?;
        let latents = self.attend(slots, &q, &kv, &state.selection)?;
        add(&mut state.hidden, &layer.o.apply(&self.values(layer, &latents)?)?);

        let x = rms_norm(state.hidden.clone(), &layer.post_norm, eps);
        let (mut gate, up) = (layer.gate.apply(&x)?, layer.up.apply(&x)?);
        gate.iter_mut().zip(up).for_each(|(g, u)| *g = *g / (1.0 + (-*g).exp()) * u);
        add(&mut state.hidden, &layer.down.apply(&gate)?);
        Ok(())
    }

    /// `[tokens, topk]` from the normed hidden state and the query latent.
    fn select(&self, indexer: &Indexer, slots: &Slots, x: &[f32], cq: &[f32]) -> Result<Vec<i32>> {
        let (heads, dim, topk) =
            (self.config.index_n_heads, self.config.index_head_dim, self.config.index_topk);
        let tokens = slots.numbers.len();
        let (mut q, mut k) = (indexer.wq_b.apply(cq)?, indexer.wk.apply(x)?);
        let weights = indexer.weights_proj.apply(x)?;
        layer_norm(&mut k, &indexer.k_norm_weight, &indexer.k_norm_bias);
        self.rotate(&mut q, heads, dim, 0);
        self.rotate(&mut k, 1, dim, 0);

        let page = [slots.table.len(), PAGE * (dim + 4)];
        let mut pages = vec![0u8; page[0] * page[1]];
        let write = IndexKWriteArgs {
            k: Tensor::from_slice("k", &k, &[tokens, dim])?,
            slots: slots.tensor()?,
            pages: Tensor::from_slice_mut("pages", &mut pages, &page)?,
            hadamard: false,
            pow2_scale: false,
        };
        self.context.index_k_write(&write.check()?, Stream::DEFAULT)?;

        let (mut q8, mut scaled) = (vec![F8E4M3::default(); q.len()], vec![0.0; weights.len()]);
        let quantize = IndexQQuantizeArgs {
            q: Tensor::from_slice("q", &q, &[tokens, heads, dim])?,
            weights: Tensor::from_slice("weights", &weights, &[tokens, heads])?,
            scale: 1.0 / ((dim * heads) as f32).sqrt(),
            hadamard: false,
            pow2_scale: false,
            q_out: Tensor::from_slice_mut("q_out", &mut q8, &[tokens, heads, dim])?,
            weights_out: Tensor::from_slice_mut("weights_out", &mut scaled, &[tokens, heads])?,
        };
        self.context.index_q_quantize(&quantize.check()?, Stream::DEFAULT)?;

        let mut selection = vec![0; tokens * topk];
        let args = IndexerArgs {
            q: Tensor::from_slice("q", &q8, &[tokens, heads, dim])?,
            weights: Tensor::from_slice("weights", &scaled, &[tokens, heads])?,
            k: Tensor::from_slice("k", &pages, &page)?,
            k_scale: None,
            map: slots.map()?,
        };
        let indices = Tensor::from_slice_mut("indices", &mut selection, &[tokens, topk])?;
        let op = args.check_select(indices)?;
        let mut workspace = vec![0u8; self.context.select_workspace(&op)];
        self.context.select(&op, workspace.as_mut_slice().into(), Stream::DEFAULT)?;
        Ok(selection)
    }

    /// `[tokens, heads, kv_row]`: `W_uk.T q`, then the rotated part.
    fn absorbed_queries(&self, layer: &Layer, cq: &[f32]) -> Result<Vec<f32>> {
        let c = &self.config;
        let (heads, nope, latent) = (c.num_attention_heads, c.qk_nope_head_dim, c.kv_lora_rank);
        let q = layer.q_b.apply(cq)?;
        let tokens = q.len() / (heads * c.qk());
        let mut absorbed = vec![0.0; tokens * heads * c.kv_row()];
        let q = ArrayView3::from_shape((tokens, heads, c.qk()), &q).map_err(shape)?;
        let kv_b = self.kv_b(layer)?;
        let mut out =
            ArrayViewMut3::from_shape((tokens, heads, c.kv_row()), &mut absorbed).map_err(shape)?;
        for h in 0..heads {
            let uk = kv_b.slice(s![h, ..nope, ..]);
            let mut latents = out.slice_mut(s![.., h, ..latent]);
            general_mat_mul(1.0, &q.slice(s![.., h, ..nope]), &uk, 0.0, &mut latents);
        }
        out.slice_mut(s![.., .., latent..]).assign(&q.slice(s![.., .., nope..]));
        self.rotate(&mut absorbed, heads, c.kv_row(), latent);
        Ok(absorbed)
    }

    /// `[tokens, kv_row]`.
    fn kv_rows(&self, layer: &Layer, x: &[f32]) -> Result<Vec<f32>> {
        let (width, latent) = (self.config.kv_row(), self.config.kv_lora_rank);
        let mut kv = layer.kv_a.apply(x)?;
        for row in kv.chunks_exact_mut(width) {
            norm_row(&mut row[..latent], &layer.kv_norm, self.config.rms_norm_eps);
        }
        self.rotate(&mut kv, 1, width, latent);
        Ok(kv)
    }

    /// `[tokens, heads, latent]`: what the selected KV rows, rounded to bf16, mix to.
    fn attend(&self, slots: &Slots, q: &[f32], kv: &[f32], selection: &[i32]) -> Result<Vec<f32>> {
        let c = &self.config;
        let (heads, latent, width) = (c.num_attention_heads, c.kv_lora_rank, c.kv_row());
        let tokens = slots.numbers.len();
        let page = [slots.table.len(), PAGE, width];
        let mut pages = vec![bf16::ZERO; page.iter().product()];
        let write = KvWriteArgs {
            kv: Tensor::from_slice("kv", kv, &[tokens, width])?,
            slots: slots.tensor()?,
            pages: Tensor::from_slice_mut("pages", &mut pages, &page)?,
        };
        self.context.kv_write(&write.check()?, Stream::DEFAULT)?;

        let mut out = vec![0.0f32; tokens * heads * latent];
        let args = SparseAttentionArgs {
            q: Tensor::from_slice("q", q, &[tokens, heads, width])?,
            kv: Tensor::from_slice("kv", &pages, &page)?,
            indices: Tensor::from_slice("indices", selection, &[tokens, c.index_topk])?,
            form: IndexForm::Logical,
            map: slots.map()?,
            row_topk: None,
            sink: None,
            softmax_scale: 1.0 / (c.qk() as f32).sqrt(),
            out: Tensor::from_slice_mut("out", &mut out, &[tokens, heads, latent])?,
            lse: None,
            probs: None,
        };
        let op = args.check()?;
        let mut workspace = vec![0u8; self.context.sparse_attention_workspace(&op)];
        self.context.sparse_attention(&op, workspace.as_mut_slice().into(), Stream::DEFAULT)?;
        Ok(out)
    }

    /// `[tokens, heads, value]`: `W_uv` times the latents.
    fn values(&self, layer: &Layer, latents: &[f32]) -> Result<Vec<f32>> {
        let c = &self.config;
        let (heads, value, latent) = (c.num_attention_heads, c.v_head_dim, c.kv_lora_rank);
        let tokens = latents.len() / (heads * latent);
        let mut values = vec![0.0; tokens * heads * value];
        let latents = ArrayView3::from_shape((tokens, heads, latent), latents).map_err(shape)?;
        let kv_b = self.kv_b(layer)?;
        let mut out =
            ArrayViewMut3::from_shape((tokens, heads, value), &mut values).map_err(shape)?;
        for h in 0..heads {
            let uv = kv_b.slice(s![h, c.qk_nope_head_dim.., ..]);
            let mut out = out.slice_mut(s![.., h, ..]);
            general_mat_mul(1.0, &latents.slice(s![.., h, ..]), &uv.t(), 0.0, &mut out);
        }
        Ok(values)
    }

    fn kv_b<'a>(&self, layer: &'a Layer) -> Result<ArrayView3<'a, f32>> {
        let c = &self.config;
        let head = (c.num_attention_heads, c.qk_nope_head_dim + c.v_head_dim, c.kv_lora_rank);
        ArrayView3::from_shape(head, &layer.kv_b).map_err(shape)
    }

    /// `-log2` of the probability of each byte but the first, summed.
    fn score(&self, text: &[u8], hidden: Vec<f32>) -> Result<f64> {
        let logits =
            self.embedding.apply(&rms_norm(hidden, &self.norm, self.config.rms_norm_eps))?;
        let scored = logits.chunks_exact(self.embedding.out).zip(text.iter().skip(1));
        let nats = scored.map(|(logits, byte)| {
            let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let sum: f64 = logits.iter().map(|l| f64::from((l - max).exp())).sum();
            sum.ln() + f64::from(max - logits[usize::from(*byte)])
        });
        Ok(nats.sum::<f64>() / std::f64::consts::LN_2)
    }

    /// Rotates, of each token's `heads` vectors of `width`, the numbers from `at` on, in interleaved pairs.
    fn rotate(&self, x: &mut [f32], heads: usize, width: usize, at: usize) {
        let rope = self.config.qk_rope_head_dim;
        let angles = self.rope.chunks_exact(rope / 2);
        for (token, angles) in x.chunks_exact_mut(heads * width).zip(angles) {
            for head in token.chunks_exact_mut(width) {
                let pairs = head[at..at + rope].chunks_exact_mut(2);
                for (x, (cos, sin)) in pairs.zip(angles) {
                    (x[0], x[1]) = (x[0] * cos - x[1] * sin, x[0] * sin + x[1] * cos);
                }
            }
        }
    }
}

fn rope_table(c: &Config) -> Vec<(f32, f32)> {
    let (pairs, width) = (c.qk_rope_head_dim / 2, c.qk_rope_head_dim as f64);
    let angle = |at: usize| {
        let (position, pair) = (at / pairs, at % pairs);
        let angle = position as f64 * c.rope_theta.powf(-2.0 * pair as f64 / width);
        (angle.cos() as f32, angle.sin() as f32)
    };
    (0..c.max_position_embeddings * pairs).map(angle).collect()
}

/// A sum in eight lanes: the compiler may use vectors without being free to reorder.
fn sum(x: &[f32], term: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0.0; 8];
    for chunk in x.chunks(8) {
        lanes.iter_mut().zip(chunk).for_each(|(lane, x)| *lane += term(*x));
    }
    lanes.iter().sum()
}

fn norm_row(x: &mut [f32], weight: &[f32], eps: f32) {
    let mean = sum(x, |x| x * x) / x.len() as f32;
    let scale = 1.0 / (mean + eps).sqrt();
    x.iter_mut().zip(weight).for_each(|(x, w)| *x = *x * scale * w);
}

fn rms_norm(mut x: Vec<f32>, weight: &[f32], eps: f32) -> Vec<f32> {
    x.chunks_exact_mut(weight.len()).for_each(|row| norm_row(row, weight, eps));
    x
}

fn layer_norm(x: &mut [f32], weight: &[f32], bias: &[f32]) {
    for x in x.chunks_exact_mut(weight.len()) {
        let mean = sum(x, |x| x) / x.len() as f32;
        let variance = sum(x, |x| (x - mean) * (x - mean)) / x.len() as f32;
        let scale = 1.0 / (variance + K_NORM_EPS).sqrt();
        let affine = weight.iter().zip(bias);
        x.iter_mut().zip(affine).for_each(|(x, (w, b))| *x = (*x - mean) * scale * w + b);
    }
}

fn add(x: &mut [f32], y: &[f32]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}
