//! A model's `config.json`.
//!
//! What is read is what the servers of each model read, from where they read it. What would be ignored there is
//! refused or noted, so that reuse cannot be configured and yet be off without anybody seeing it.

use super::{
    Dialect, Field, IndexKFormat, Indexers, Layout, MAX_LAYERS, Model, Origin, Pattern, Plan, Role,
    Spelling,
};
use crate::error::{Error, Result};
use serde_json::{Map, Value};
use std::fmt;

/// What a caller wants otherwise than the config says.
#[derive(Clone, Copy, Debug, Default)]
pub struct HfOptions<'a> {
    /// A pattern that overrules the config's.
    pub pattern: Option<Spelling<'a>>,
    /// Whose rule `index_topk_freq` follows, instead of the model's usual one.
    pub dialect: Option<Dialect>,
    /// Overrules `index_topk`.
    pub topk: Option<u32>,
}

/// Models by what their configs look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Family {
    /// deepseek_v32, glm_moe_dsa and hy_v4: DSA on all layers, or on those that `layer_types` names.
    Dsa,
    /// DSA layers among linear-attention layers, pooled index keys.
    Glm5Next,
    /// Compressed KV; the layers with ratio 4 have an indexer.
    DeepseekV4,
    /// Compressed KV; every compressed layer selects, some share index K.
    DeepseekV41,
    /// Blocks of 128, selected for each KV head.
    MinimaxM3,
    /// Anything else with `index_topk`, read as `Dsa`.
    Unknown,
}

impl Family {
    fn of(model_type: &str) -> Self {
        match model_type.trim_end_matches("_text").trim_end_matches("_vl") {
            "deepseek_v32" | "glm_moe_dsa" | "hy_v4" | "hy4" => Family::Dsa,
            "glm5_next" => Family::Glm5Next,
            "deepseek_v4" => Family::DeepseekV4,
            "deepseek_v41" => Family::DeepseekV41,
            "minimax_m3" => Family::MinimaxM3,
            _ => Family::Unknown,
        }
    }

    fn dialect(self) -> Dialect {
        match self {
            Family::Glm5Next => Dialect::Atom,
            Family::DeepseekV4 | Family::DeepseekV41 => Dialect::V4,
            Family::MinimaxM3 => Dialect::M3,
            Family::Dsa | Family::Unknown => Dialect::Hf,
        }
    }

    /// Servers reuse on this model only when `use_index_cache` is true.
    fn needs_switch(self) -> bool {
        matches!(self, Family::DeepseekV4 | Family::MinimaxM3)
    }
}

/// Objects that wrap a language model's own config.
const WRAPPERS: [&str; 3] = ["text_config", "language_config", "llm_config"];

/// Fields about reuse. Elsewhere than among the model's own fields, servers do not see them.
const REUSE: [&str; 7] = [
    "indexer_types",
    "index_topk_pattern",
    "index_source_layer_ids",
    "index_topk_freq",
    "index_skip_topk_offset",
    "index_share_for_mtp_iteration",
    "use_index_cache",
];

/// Other fields of the same prefix that are known.
const INDEX_FIELDS: [&str; 10] = [
    "index_topk",
    "index_n_heads",
    "index_head_dim",
    "index_kpool",
    "index_kpool_compress",
    "index_kpool_always_select_tail",
    "index_dsa_use_layernorm",
    "index_topk_min_seq_len",
    "indexer_rope_interleave",
    "index_rope_interleave",
];

impl Plan {
    /// Reads a `config.json`.
    pub fn from_hf_config(json: &[u8]) -> Result<Self> {
        Self::from_hf_config_with(json, &HfOptions::default())
    }

    /// The rule that servers of this config's model apply to a frequency.
    pub fn hf_dialect(json: &[u8]) -> Result<Dialect> {
        let root = parse(json)?;
        let home = Node::home(&root);
        Ok(family(&root, &home)?.0.dialect())
    }

    /// The fields of a `config.json` as its model sees them: where an inner object describes the model, that one's
    /// before those around it.
    pub fn hf_fields(json: &[u8]) -> Result<Map<String, Value>> {
        let root = parse(json)?;
        let own = Node::home(&root).map.clone();
        let mut fields = root;
        fields.extend(own);
        Ok(fields)
    }

    /// Reads a `config.json`, of which the caller overrules a part.
    pub fn from_hf_config_with(json: &[u8], options: &HfOptions<'_>) -> Result<Self> {
        let root = parse(json)?;
        let home = Node::home(&root);
        if options.pattern.is_none() {
            misplaced(&root, "", &home)?;
        }
        Reader::new(&root, home, options)?.plan()
    }
}

fn parse(json: &[u8]) -> Result<Map<String, Value>> {
    let root = serde_json::from_slice(json)
        .map_err(|e| Error::config(format!("the config is not valid JSON: {e}")))?;
    match root {
        Value::Object(map) => Ok(map),
        _ => Err(Error::config("the config is not a JSON object")),
    }
}

/// The family, and the model_type that names it.
fn family<'a>(root: &'a Map<String, Value>, home: &Node<'a>) -> Result<(Family, &'a str)> {
    let outer = Node { map: root, path: Path::default() };
    let mut first = None;
    for node in [home, &outer] {
        match node.get("model_type") {
            None => {}
            Some(Value::String(name)) => match Family::of(name) {
                Family::Unknown => first = first.or(Some(name.as_str())),
                Family::DeepseekV4 if home.get("index_source_layer_ids").is_some() => {
                    return Ok((Family::DeepseekV41, name));
                }
                known => return Ok((known, name)),
            },
            Some(other) => return Err(node.bad("model_type", "a string", other)),
        }
    }
    Ok((Family::Unknown, first.unwrap_or("(none)")))
}

/// A JSON object and where it is.
#[derive(Clone, Copy)]
struct Node<'a> {
    map: &'a Map<String, Value>,
    path: Path,
}

/// The names of the objects that lead to a field, outermost first; empty where there are fewer.
#[derive(Clone, Copy, Default)]
struct Path(&'static str, &'static str);

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut names = [self.0, self.1].into_iter().filter(|n| !n.is_empty());
        names.try_for_each(|n| write!(f, "{n}."))
    }
}

impl<'a> Node<'a> {
    /// The object with the model's own fields: the wrapped one, where it describes a model.
    fn home(root: &'a Map<String, Value>) -> Self {
        for wrapper in WRAPPERS {
            if let Some(Value::Object(map)) = root.get(wrapper)
                && map.contains_key("num_hidden_layers")
            {
                return Self { map, path: Path(wrapper, "") };
            }
        }
        Self { map: root, path: Path::default() }
    }

    /// An object within this one.
    fn inner(&self, key: &'static str) -> Result<Option<Self>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Self { map, path: Path(self.path.0, key) })),
            Some(other) => Err(self.bad(key, "an object", other)),
        }
    }

    /// A field that is there and not null.
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    fn bad(&self, key: &str, expected: &str, got: &Value) -> Error {
        Error::config(format!("{}{key} must be {expected}, got {}", self.path, brief(got)))
    }

    fn int(&self, key: &str) -> Result<Option<i64>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_i64().map(Some).ok_or_else(|| self.bad(key, "an integer", value))
    }

    /// A size or a count.
    fn dim(&self, key: &str) -> Result<Option<u32>> {
        const MOST: i64 = 1 << 20;
        let Some(value) = self.int(key)? else { return Ok(None) };
        match u32::try_from(value) {
            Ok(dim) if value <= MOST => Ok(Some(dim)),
            _ => Err(Error::config(format!(
                "{}{key} must be from 0 to {MOST}, got {value}",
                self.path
            ))),
        }
    }

    fn need(&self, key: &str, why: &str) -> Result<u32> {
        self.dim(key)?.ok_or_else(|| Error::config(format!("{}{key} is missing: {why}", self.path)))
    }

    fn flag(&self, key: &str) -> Result<Option<bool>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| self.bad(key, "true or false", value))
    }

    fn list(&self, key: &str) -> Result<Option<&'a [Value]>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(list)) => Ok(Some(list)),
            Some(other) => Err(self.bad(key, "a list", other)),
        }
    }

    fn entry(&self, key: &str, position: usize, expected: &str, got: &Value) -> Error {
        Error::config(format!(
            "{}{key}: entry {position} must be {expected}, got {}",
            self.path,
            brief(got)
        ))
    }

    fn strings(&self, key: &str) -> Result<Option<Vec<&'a str>>> {
        let Some(list) = self.list(key)? else { return Ok(None) };
        let read = |(i, v): (usize, &'a Value)| {
            v.as_str().ok_or_else(|| self.entry(key, i, "a string", v))
        };
        list.iter().enumerate().map(read).collect::<Result<_>>().map(Some)
    }

    /// Integers, or with `flags` also true and false.
    fn ints(&self, key: &str, flags: bool) -> Result<Option<Vec<i64>>> {
        let Some(list) = self.list(key)? else { return Ok(None) };
        let read = |(i, v): (usize, &'a Value)| {
            let flag = if flags { v.as_bool().map(i64::from) } else { None };
            flag.or_else(|| v.as_i64()).ok_or_else(|| self.entry(key, i, "an integer", v))
        };
        list.iter().enumerate().map(read).collect::<Result<_>>().map(Some)
    }
}

/// A value as a person should see it in a message.
fn brief(value: &Value) -> String {
    match value {
        Value::Array(list) => format!("a list of {}", list.len()),
        Value::Object(_) => "an object".into(),
        Value::String(text) if text.chars().count() > 40 => {
            format!("a string of {} characters", text.chars().count())
        }
        other => other.to_string(),
    }
}

/// Refuses reuse fields that no server would find.
fn misplaced(map: &Map<String, Value>, path: &str, home: &Node<'_>) -> Result<()> {
    for (key, value) in map {
        if let Value::Object(inner) = value {
            // Another model's config, such as a vision tower's or a draft's, is its own business.
            if !inner.contains_key("num_hidden_layers") || std::ptr::eq(inner, home.map) {
                misplaced(inner, &format!("{path}{key}."), home)?;
            }
            continue;
        }
        let here = std::ptr::eq(map, home.map);
        if here || !REUSE.contains(&key.as_str()) || harmless(key, value, home) {
            continue;
        }
        let right = match home.path.0 {
            "" => "at the top level".into(),
            wrapper => format!("inside {wrapper}"),
        };
        return Err(Error::config(format!(
            "{path}{key} would be ignored, because the model's own fields are {right}; move it there"
        )));
    }
    Ok(())
}

/// Says nothing, or nothing that the right place does not say, too.
fn harmless(key: &str, value: &Value, home: &Node<'_>) -> bool {
    let default = match key {
        "index_topk_freq" => value.as_i64() == Some(1),
        "use_index_cache" | "index_share_for_mtp_iteration" => value.as_bool() == Some(false),
        "index_skip_topk_offset" => home.get("index_topk_freq").is_none(),
        _ => false,
    };
    value.is_null() || home.get(key).map_or(default, |there| there == value)
}

/// One field's idea of the pattern.
struct Claim {
    origin: Origin,
    pattern: Pattern,
}

struct Reader<'a> {
    home: Node<'a>,
    options: &'a HfOptions<'a>,
    family: Family,
    layers: u32,
    mtp_layers: u32,
    notes: Vec<String>,
}

impl<'a> Reader<'a> {
    fn new(
        root: &'a Map<String, Value>,
        home: Node<'a>,
        options: &'a HfOptions<'a>,
    ) -> Result<Self> {
        let (family, name) = family(root, &home)?;
        let mut notes = Vec::new();
        if family == Family::Unknown {
            let name = name.escape_default();
            for key in ["compress_ratios", "sparse_attention_config"] {
                if home.get(key).is_some() {
                    return Err(Error::config(format!(
                        "model_type {name} is not known, and {}{key} says that its layers differ; give the pattern yourself, with - for layers without an indexer",
                        home.path
                    )));
                }
            }
            if home.get("index_topk").is_none() && options.topk.is_none() {
                return Err(Error::config(format!(
                    "model_type {name} is not known and the config has no {}index_topk, so this is not a model with sparse attention that can be planned",
                    home.path
                )));
            }
            notes.push(format!(
                "model_type {name} is not known: read as DeepSeek Sparse Attention, in the hf rule"
            ));
        }
        let layers = home.need("num_hidden_layers", "give the number of decoder layers")?;
        if !(1..=MAX_LAYERS as u32).contains(&layers) {
            return Err(Error::config(format!(
                "{}num_hidden_layers must be from 1 to {MAX_LAYERS}, got {layers}",
                home.path
            )));
        }
        let draft = match family {
            Family::MinimaxM3 if home.get("num_mtp_modules").is_some() => "num_mtp_modules",
            _ => "num_nextn_predict_layers",
        };
        let mtp_layers = home.dim(draft)?.unwrap_or(0);
        Ok(Self { home, options, family, layers, mtp_layers, notes })
    }

    fn plan(mut self) -> Result<Plan> {
        let model = self.model()?;
        let (indexers, layout) = self.layout()?;
        let before = self.notes.len();
        let own = self.claims(&indexers).and_then(|claims| self.decide(claims, &indexers));
        let (claim, inactive) = match &self.options.pattern {
            None => own?,
            Some(spelling) => {
                self.notes.truncate(before);
                (self.overrule(spelling, &indexers, own)?, None)
            }
        };
        self.strangers();
        let mut plan = Plan::assemble(claim.pattern, model, layout, claim.origin)?;
        plan.notes = self.notes;
        if let Some(why) = inactive {
            plan.notes.insert(0, format!("configured but inactive: {why}"));
            plan.inactive = Some(why);
        }
        Ok(plan)
    }

    fn model(&mut self) -> Result<Model> {
        let home = self.home;
        let (topk, dim);
        let mut model = Model::new(0);
        if self.family == Family::MinimaxM3 {
            let sparse = self.m3()?;
            topk = sparse.dim("sparse_topk_blocks")?;
            dim = sparse.dim("sparse_index_dim")?.or(home.dim("head_dim")?);
            model.index_heads = sparse.dim("sparse_num_index_heads")?.unwrap_or(0);
            model.block = sparse.need("sparse_block_size", "give the size of a selected block")?;
            model.selections =
                home.need("num_key_value_heads", "each KV head selects its own blocks")?;
            model.index_k = IndexKFormat::Bf16;
            if self.options.topk.or(topk).is_none() {
                return Err(Error::config(format!(
                    "{}sparse_topk_blocks is missing: give the number of blocks that are selected",
                    sparse.path
                )));
            }
        } else {
            topk = home.dim("index_topk")?;
            dim = home.dim("index_head_dim")?;
            model.index_heads = home.dim("index_n_heads")?.unwrap_or(0);
            if self.options.topk.or(topk).is_none() {
                return Err(Error::config(format!(
                    "{}index_topk is missing: give the number of positions that the indexer selects",
                    home.path
                )));
            }
        }
        model.topk = self.options.topk.or(topk).unwrap_or(0);
        match dim {
            Some(dim) => model.index_head_dim = dim,
            None => self.notes.push(format!(
                "index_head_dim is not given and taken to be {}",
                model.index_head_dim
            )),
        }
        model.attention_heads = home.dim("num_attention_heads")?.unwrap_or(0);
        model.kv_lora_rank = home.dim("kv_lora_rank")?.unwrap_or(0);
        model.rope_head_dim = home.dim("qk_rope_head_dim")?.unwrap_or(0);
        model.sink = match self.family {
            Family::DeepseekV4 | Family::DeepseekV41 => true,
            _ => home.flag("learnable_sink")?.unwrap_or(false),
        };
        model.mtp_layers = self.mtp_layers;
        model.mtp_shares = home.flag("index_share_for_mtp_iteration")?.unwrap_or(false);
        if self.family == Family::Glm5Next {
            model.key_pool = home.dim("index_kpool")?.unwrap_or(1);
            if home.flag("index_kpool_compress")? == Some(false) && model.key_pool > 1 {
                self.notes.push(format!(
                    "index_kpool is {}, but index_kpool_compress is false: keys are not pooled",
                    model.key_pool
                ));
                model.key_pool = 1;
            }
            let tail = home.flag("index_kpool_always_select_tail")?.unwrap_or(false);
            model.always_tail = tail && model.key_pool > 1;
        }
        Ok(model)
    }

    fn m3(&self) -> Result<Node<'a>> {
        let key = "sparse_attention_config";
        let Some(node) = self.home.inner(key)? else {
            return Err(Error::config(format!(
                "{}{key} is missing: without it servers run this model dense, so there is nothing to plan",
                self.home.path
            )));
        };
        if node.flag("use_sparse_attention")? == Some(false) {
            return Err(Error::config(format!(
                "{}use_sparse_attention is false: no layer has an indexer, so there is nothing to plan",
                node.path
            )));
        }
        Ok(node)
    }

    /// Which layers have an indexer, and how they differ.
    fn layout(&mut self) -> Result<(Indexers, Layout)> {
        let home = self.home;
        let layers = self.layers as usize;
        let mut layout = Layout::default();
        let bears = match self.family {
            Family::Dsa | Family::Unknown => self.layer_types()?.unwrap_or(vec![true; layers]),
            Family::Glm5Next => match (self.layer_types()?, self.linear_layers()?) {
                (Some(bears), _) | (None, Some(bears)) => bears,
                (None, None) => {
                    return Err(Error::config(format!(
                        "{}layer_types is missing: it says which layers attend sparsely and which linearly",
                        home.path
                    )));
                }
            },
            Family::MinimaxM3 => {
                let sparse = self.m3()?;
                let Some(list) = sparse.ints("sparse_attention_freq", true)? else {
                    return Err(Error::config(format!(
                        "{}sparse_attention_freq is missing: without it servers run this model dense, so there is nothing to plan",
                        sparse.path
                    )));
                };
                self.per_layer(&sparse, "sparse_attention_freq", list)?
                    .iter()
                    .take(layers)
                    .map(|f| *f != 0)
                    .collect()
            }
            Family::DeepseekV4 | Family::DeepseekV41 => {
                let Some(list) = home.ints("compress_ratios", false)? else {
                    return Err(Error::config(format!(
                        "{}compress_ratios is missing: it says which layers have an indexer",
                        home.path
                    )));
                };
                let mut ratios = Vec::with_capacity(list.len());
                for (i, ratio) in self.per_layer(&home, "compress_ratios", list)?.iter().enumerate()
                {
                    let ratio = u32::try_from(*ratio).map_err(|_| {
                        Error::config(format!(
                            "{}compress_ratios: entry {i} must be 0 or more, got {ratio}",
                            home.path
                        ))
                    })?;
                    let indexed = match self.family {
                        Family::DeepseekV4 => ratio == 4,
                        _ => ratio != 0,
                    };
                    ratios.push(if indexed { ratio } else { 0 });
                }
                let bears = ratios.iter().take(layers).map(|r| *r != 0).collect();
                ratios.resize(layers + self.mtp_layers as usize, 0);
                layout.ratios = ratios;
                layout.index_k_owners = self.index_k_owners()?;
                bears
            }
        };
        Ok((Indexers::exactly(bears)?, layout))
    }

    /// A list with an entry a layer; entries for draft layers may follow.
    fn per_layer(&self, node: &Node<'_>, key: &str, list: Vec<i64>) -> Result<Vec<i64>> {
        let (layers, draft) = (self.layers as usize, self.mtp_layers as usize);
        let whole = list.len() == layers || list.len() == layers + draft;
        // Draft stages beyond those counted attend a window only, and are listed with 0.
        let windows = list.get(layers..).is_some_and(|rest| rest.iter().all(|r| *r == 0));
        if whole || windows {
            return Ok(list);
        }
        Err(Error::config(format!(
            "{}{key} has {} entries but the model has {layers} layers and {draft} draft layers: give {layers} or {}",
            node.path,
            list.len(),
            layers + draft
        )))
    }

    /// `layer_types`, where it tells sparse layers from others.
    fn layer_types(&self) -> Result<Option<Vec<bool>>> {
        let Some(types) = self.home.strings("layer_types")? else { return Ok(None) };
        let sparse = match () {
            _ if types.contains(&"deepseek_sparse_attention") => "deepseek_sparse_attention",
            _ if types.contains(&"linear_attention") => "full_attention",
            _ => return Ok(None),
        };
        let flags = types.iter().map(|t| i64::from(*t == sparse)).collect();
        let flags = self.per_layer(&self.home, "layer_types", flags)?;
        Ok(Some(flags.iter().take(self.layers as usize).map(|f| *f != 0).collect()))
    }

    /// `linear_attn_config.full_attn_layers`.
    fn linear_layers(&self) -> Result<Option<Vec<bool>>> {
        let Some(node) = self.home.inner("linear_attn_config")? else { return Ok(None) };
        let Some(ids) = node.ints("full_attn_layers", false)? else { return Ok(None) };
        let mut bears = vec![false; self.layers as usize];
        for id in ids {
            match usize::try_from(id).ok().and_then(|i| bears.get_mut(i)) {
                Some(bear) => *bear = true,
                None => {
                    return Err(Error::config(format!(
                        "{}full_attn_layers: layer {id} is outside 0..={}",
                        node.path,
                        self.layers - 1
                    )));
                }
            }
        }
        Ok(Some(bears))
    }

    /// The layers that publish index K, where indexers share it.
    fn index_k_owners(&mut self) -> Result<Vec<u32>> {
        let key = "kv_source_layer_ids";
        if self.family != Family::DeepseekV41 {
            return Ok(Vec::new());
        }
        let Some(ids) = self.home.ints(key, false)? else {
            return Err(Error::config(format!(
                "{}{key} is missing: it says which layers publish the index K that the others read",
                self.home.path
            )));
        };
        let mut owners = Vec::with_capacity(ids.len());
        for id in ids {
            let Some(owner) = u32::try_from(id).ok().filter(|o| *o < self.layers) else {
                return Err(Error::config(format!(
                    "{}{key}: layer {id} is outside 0..={}",
                    self.home.path,
                    self.layers - 1
                )));
            };
            if owners.last().is_some_and(|o| *o >= owner) {
                return Err(Error::config(format!(
                    "{}{key}: layer {id} comes after layer {}; list each layer once, in ascending order",
                    self.home.path,
                    owners.last().unwrap_or(&0)
                )));
            }
            owners.push(owner);
        }
        if self.home.int("candidate_source_layer_id")?.is_some_and(|l| l >= 0) {
            self.notes.push(
                "candidate_source_layer_id restricts what later indexers score; that is not part of a plan".into(),
            );
        }
        Ok(owners)
    }

    /// Every field that says something about the pattern, the one that decides first.
    fn claims(&mut self, indexers: &Indexers) -> Result<Vec<Claim>> {
        let home = self.home;
        let mut claims = Vec::new();
        let mut claim = |field, dialect, spelling: &Spelling<'_>| -> Result<()> {
            let pattern = Pattern::new(spelling, indexers)?;
            claims.push(Claim { origin: Origin { field, dialect }, pattern });
            Ok(())
        };
        if let Some(types) = home.strings("indexer_types")? {
            claim(Field::IndexerTypes, None, &Spelling::IndexerTypes(&types))?;
        }
        match home.get("index_topk_pattern") {
            None => {}
            Some(Value::String(text)) => {
                claim(Field::TopkPattern, None, &Spelling::Letters(text))?;
            }
            Some(Value::Array(list)) if list.first().is_some_and(Value::is_number) => {
                let ids = home.ints("index_topk_pattern", false)?.unwrap_or_default();
                claim(Field::TopkPattern, None, &Spelling::AllowList(&ids))?;
            }
            Some(Value::Array(_)) => {
                let list = home.strings("index_topk_pattern")?.unwrap_or_default();
                claim(Field::TopkPattern, None, &Spelling::LetterList(&list))?;
            }
            Some(other) => {
                return Err(home.bad(
                    "index_topk_pattern",
                    "a string of F and S, or a list",
                    other,
                ));
            }
        }
        if let Some(ids) = home.ints("index_source_layer_ids", false)? {
            claim(Field::SourceLayerIds, None, &Spelling::SourceLayers(&ids))?;
        }
        let offset = home.int("index_skip_topk_offset")?;
        // 1 is the default, which tools write out beside the field that decides.
        if let Some(freq) = home.int("index_topk_freq")?.filter(|f| *f != 1) {
            let dialect = self.options.dialect.unwrap_or(self.family.dialect());
            claim(Field::TopkFreq, Some(dialect), &Spelling::Freq { freq, offset, dialect })?;
            if claims.len() == 1 && self.options.dialect.is_none() {
                self.other_readings(freq, offset, dialect, indexers);
            }
        }
        if let Some(dialect) = self.options.dialect
            && !claims.iter().any(|c| c.origin.dialect.is_some())
        {
            self.notes.push(format!(
                "the {dialect} rule was asked for, but there is no frequency to read"
            ));
        }
        Ok(claims)
    }

    /// Notes that another server would read the same two numbers differently.
    fn other_readings(
        &mut self,
        freq: i64,
        offset: Option<i64>,
        ours: Dialect,
        indexers: &Indexers,
    ) {
        let read = |dialect| Pattern::new(&Spelling::Freq { freq, offset, dialect }, indexers);
        let theirs = match ours {
            Dialect::Hf => Dialect::Atom,
            Dialect::Atom => Dialect::Hf,
            Dialect::V4 => Dialect::V4Atom,
            _ => return,
        };
        let differs = match (read(ours), read(theirs)) {
            (Ok(a), Ok(b)) => a.first_difference(&b),
            _ => None,
        };
        if let Some(layer) = differs {
            self.notes.push(format!(
                "index_topk_freq is read in the {ours} rule; the {theirs} rule differs from layer {layer} on, so an index_topk_pattern or indexer_types is safer"
            ));
        }
    }

    /// The claim that holds, and why it is not acted on if it is not.
    fn decide(
        &mut self,
        claims: Vec<Claim>,
        indexers: &Indexers,
    ) -> Result<(Claim, Option<String>)> {
        let switch = self.home.flag("use_index_cache")?;
        let mut claims = claims.into_iter();
        let Some(first) = claims.next() else {
            let inactive = (switch == Some(true)).then(|| {
                "use_index_cache is true, but no field says which layers are Shared".to_string()
            });
            return Ok((all_full(indexers)?, inactive));
        };
        let name = first.origin.field.name();
        for other in claims {
            let theirs = other.origin.field.name();
            if let Some(layer) = first.pattern.first_difference(&other.pattern) {
                let role = |c: &Claim| c.pattern.roles().get(layer).copied().unwrap_or(Role::None);
                return Err(Error::config(format!(
                    "{name} and {theirs} disagree, first at layer {layer} ({} against {}); remove or correct one",
                    role(&first),
                    role(&other)
                )));
            }
            self.notes.push(format!("{theirs} says the same as {name}, which decides"));
        }
        let shares = first.pattern.count(Role::Shared) != 0;
        let native = matches!(first.origin.field, Field::IndexerTypes | Field::SourceLayerIds);
        match (shares, switch) {
            (false, _) if first.origin.field == Field::TopkFreq || switch == Some(true) => {
                let why = format!("{name} leaves every layer Full");
                Ok((first, Some(why)))
            }
            (true, Some(false)) if native => {
                self.notes.push(format!(
                    "use_index_cache is false, but {name} is how the checkpoint was made: its Shared layers have no indexer to run"
                ));
                Ok((first, None))
            }
            (true, Some(false)) => {
                let why = format!("{name} asks for reuse, but use_index_cache is false");
                Ok((all_full(indexers)?, Some(why)))
            }
            (true, None) if self.family.needs_switch() => {
                self.notes.push(format!(
                    "some servers act on {name} of this model only with use_index_cache: true, which the config does not say"
                ));
                Ok((first, None))
            }
            _ => {
                if native && self.home.int("index_topk_freq")? == Some(1) && shares {
                    self.notes.push(format!(
                        "index_topk_freq is 1; servers that do not read {name} would run every layer Full"
                    ));
                }
                Ok((first, None))
            }
        }
    }

    /// The caller's pattern instead of the config's.
    fn overrule(
        &mut self,
        spelling: &Spelling<'_>,
        indexers: &Indexers,
        own: Result<(Claim, Option<String>)>,
    ) -> Result<Claim> {
        let pattern = Pattern::new(spelling, indexers)?;
        match own {
            Err(error) => {
                self.notes.push(format!("overruled, and not acceptable: {}", error.message))
            }
            Ok((claim, _)) if claim.origin.field == Field::Default => {}
            Ok((claim, _)) => {
                if let Some(layer) = pattern.first_difference(&claim.pattern) {
                    self.notes.push(format!(
                        "the argument overrules {}, which differs from layer {layer} on",
                        claim.origin.field.name()
                    ));
                }
            }
        }
        let dialect = match spelling {
            Spelling::Freq { dialect, .. } => Some(*dialect),
            _ => None,
        };
        Ok(Claim { origin: Origin { field: Field::Argument, dialect }, pattern })
    }

    /// Notes fields that look like ours and are not.
    fn strangers(&mut self) {
        for (key, value) in self.home.map {
            let known = REUSE.contains(&key.as_str()) || INDEX_FIELDS.contains(&key.as_str());
            if key.starts_with("index") && !known && !value.is_null() {
                self.notes.push(format!("{} is not read", key.escape_default()));
            }
        }
        if self.home.get("index_topk_min_seq_len").is_some() {
            self.notes
                .push("index_topk_min_seq_len is not read: a plan holds at every length".into());
        }
    }
}

fn all_full(indexers: &Indexers) -> Result<Claim> {
    let pattern = Pattern::all_full(indexers)?;
    Ok(Claim { origin: Origin { field: Field::Default, dialect: None }, pattern })
}
