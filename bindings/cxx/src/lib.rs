//! A cxx bridge over the safe API, for C++ trees that build Rust already. Others use the C ABI, of which the public
//! shared library is made; this crate is never in it.
//!
//! Errors become `rust::Error`, whose text starts with the name of the C status. Tensors are in host memory.

use indexcache::cache::CacheShape;
use indexcache::context::{BackendChoice, Stream};
use indexcache::error::Error;
use indexcache::ops::{IndexForm, IndexerArgs, KeyMapArgs, SparseAttentionArgs};
use indexcache::plan::{Indexers, Model, Pattern, Spelling};
use indexcache::tensor::{DType, Device, MAX_NDIM, Tensor, dense_strides};
use std::fmt;
use std::sync::Arc;

#[cxx::bridge(namespace = "indexcache::bridge")]
mod ffi {
    /// Element types.
    enum DType {
        I32,
        I64,
        U8,
        F32,
        Bf16,
        F8E4M3,
    }

    /// What a layer does.
    enum Role {
        None,
        Full,
        Shared,
    }

    /// What indices mean: positions within the request, or row numbers of the KV store.
    enum Form {
        Logical,
        Slots,
    }

    /// Host memory of the caller, with strides in elements; made by `tensor`. `Tensor{}` is the absent one.
    #[derive(Clone, Copy)]
    struct Tensor {
        data: *mut u8,
        dtype: DType,
        ndim: usize,
        shape: [usize; 5],
        strides: [usize; 5],
    }

    /// `idxc_indexer_desc`, shapes and all.
    struct Indexer {
        q: Tensor,
        weights: Tensor,
        k: Tensor,
        k_scale: Tensor,
        block_table: Tensor,
        row_request: Tensor,
        row_start: Tensor,
        row_end: Tensor,
    }

    /// `idxc_attention_desc`, shapes and all.
    struct Attention {
        q: Tensor,
        kv: Tensor,
        block_table: Tensor,
        row_request: Tensor,
        row_start: Tensor,
        row_topk: Tensor,
        sink: Tensor,
        out: Tensor,
        lse: Tensor,
        probs: Tensor,
        table_id: u64,
        softmax_scale: f32,
    }

    extern "Rust" {
        /// A dense tensor at `data`, which must outlive its use.
        unsafe fn tensor(data: *mut u8, dtype: DType, shape: &[usize]) -> Result<Tensor>;

        type Context;
        /// Opens the CPU backend; 0 threads: all cores.
        fn open_context(threads: usize) -> Result<Box<Context>>;

        type Plan;
        /// One `F`, `S` or `-` a layer.
        fn plan_from_pattern(pattern: &str, topk: u32) -> Result<Box<Plan>>;
        /// The text of a Hugging Face `config.json`.
        fn plan_from_hf_config(json: &str) -> Result<Box<Plan>>;
        /// Layers `first … end - 1` as a pipeline stage.
        fn slice(self: &Plan, first: u32, end: u32, promote: bool) -> Result<Box<Plan>>;
        fn pattern(self: &Plan) -> String;
        fn fingerprint(self: &Plan) -> u64;
        /// int32 entries in a row of indices.
        fn topk(self: &Plan) -> u32;
        fn role(self: &Plan, layer: u32) -> Result<Role>;
        /// The layer whose indices it uses, -1 for none.
        fn source_layer(self: &Plan, layer: u32) -> Result<i32>;
        /// Compact number of its index K, -1 unless Full.
        fn index_k_slot(self: &Plan, layer: u32) -> Result<i32>;

        type Cache;
        /// An index cache with memory of its own.
        fn new_cache(
            context: &Context,
            plan: &Plan,
            lanes: usize,
            max_rows: usize,
        ) -> Result<Box<Cache>>;
        fn step_begin(self: &mut Cache, lane: usize, rows: usize, step_id: u64) -> Result<()>;
        /// Full layer: selects. Shared layer: checks that the indices are there; `indexer` is not looked at.
        unsafe fn select(
            self: &mut Cache,
            lane: usize,
            layer: u32,
            indexer: &Indexer,
        ) -> Result<()>;
        /// int32 `[rows, topk]` in place of a `select`.
        unsafe fn publish(
            self: &mut Cache,
            lane: usize,
            layer: u32,
            indices: &Tensor,
            form: Form,
            table_id: u64,
        ) -> Result<()>;
        /// The indices that the layer uses, `[rows, topk]` without gaps.
        fn indices(self: &Cache, lane: usize, layer: u32) -> Result<&[i32]>;
        unsafe fn attend(
            self: &mut Cache,
            lane: usize,
            layer: u32,
            attention: &Attention,
        ) -> Result<()>;
    }
}

/// One backend on one device.
struct Context(Arc<indexcache::context::Context>);
/// A resolved pattern.
struct Plan(Arc<indexcache::plan::Plan>);
/// An index cache and the scratch of its calls, which grows to what they need.
struct Cache {
    cache: indexcache::cache::Cache,
    scratch: Vec<u8>,
}

/// An error as C++ reads it.
struct Failure(Error);
type Result<T> = std::result::Result<T, Failure>;

impl From<Error> for Failure {
    fn from(e: Error) -> Self {
        Self(e)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = indexcache::capi::idxc_status_name(self.0.status as i32);
        // SAFETY: a static string that ends in NUL.
        let name = unsafe { std::ffi::CStr::from_ptr(name) };
        write!(f, "{}: {}", name.to_string_lossy(), self.0)
    }
}

/// # Safety
/// As [`Tensor::from_raw_parts`], as long as the result is used.
unsafe fn tensor(data: *mut u8, dtype: ffi::DType, shape: &[usize]) -> Result<ffi::Tensor> {
    let mut t = ffi::Tensor { data, dtype, ndim: shape.len(), shape: [0; 5], strides: [0; 5] };
    if shape.len() > MAX_NDIM {
        let at_most = format_args!("at most {MAX_NDIM} dimensions");
        return Err(Error::invalid("shape", at_most, shape.len()).into());
    }
    t.shape[..shape.len()].copy_from_slice(shape);
    t.strides = dense_strides(shape);
    Ok(t)
}

impl ffi::Tensor {
    /// # Safety
    /// As [`Tensor::from_raw_parts`].
    unsafe fn get<'a>(&self, name: &'static str) -> indexcache::error::Result<Option<Tensor<'a>>> {
        if self.data.is_null() && self.ndim == 0 {
            return Ok(None);
        }
        let dtype = match self.dtype {
            ffi::DType::I32 => DType::I32,
            ffi::DType::I64 => DType::I64,
            ffi::DType::U8 => DType::U8,
            ffi::DType::F32 => DType::F32,
            ffi::DType::Bf16 => DType::Bf16,
            ffi::DType::F8E4M3 => DType::F8E4M3,
            other => return Err(Error::invalid(name, "a DType", other.repr)),
        };
        let extents = (self.shape.get(..self.ndim)).zip(self.strides.get(..self.ndim));
        let Some((shape, strides)) = extents else {
            let at_most = format_args!("at most {MAX_NDIM} dimensions");
            return Err(Error::invalid(name, at_most, self.ndim));
        };
        // SAFETY: by this function's contract.
        unsafe { Tensor::from_raw_parts(name, self.data, Device::Cpu, dtype, shape, strides) }
            .map(Some)
    }

    /// # Safety
    /// As [`Tensor::from_raw_parts`].
    unsafe fn need<'a>(&self, name: &'static str) -> indexcache::error::Result<Tensor<'a>> {
        // SAFETY: by this function's contract.
        unsafe { self.get(name) }?.ok_or_else(|| Error::invalid(name, "a tensor", "none"))
    }
}

impl ffi::Indexer {
    /// # Safety
    /// As [`Tensor::from_raw_parts`], for each tensor.
    unsafe fn args<'a>(&self) -> indexcache::error::Result<IndexerArgs<'a>> {
        // SAFETY: by this function's contract.
        unsafe {
            Ok(IndexerArgs {
                q: self.q.need("q")?,
                weights: self.weights.need("weights")?,
                k: self.k.need("k")?,
                k_scale: self.k_scale.get("k_scale")?,
                map: KeyMapArgs {
                    block_table: self.block_table.get("block_table")?,
                    row_request: self.row_request.get("row_request")?,
                    row_start: self.row_start.get("row_start")?,
                    row_end: self.row_end.get("row_end")?,
                },
            })
        }
    }
}

fn open_context(threads: usize) -> Result<Box<Context>> {
    let context = indexcache::context::Context::new(BackendChoice::Cpu, threads, || {})?;
    Ok(Box::new(Context(Arc::new(context))))
}

fn plan_from_pattern(pattern: &str, topk: u32) -> Result<Box<Plan>> {
    let indexers = Indexers::any(pattern.chars().count() as u64)?;
    let pattern = Pattern::new(&Spelling::Letters(pattern), &indexers)?;
    Ok(Plan::boxed(indexcache::plan::Plan::new(pattern, Model::new(topk))?))
}

fn plan_from_hf_config(json: &str) -> Result<Box<Plan>> {
    Ok(Plan::boxed(indexcache::plan::Plan::from_hf_config(json.as_bytes())?))
}

/// A layer number as C++ reads it.
fn layer_number(layer: Option<u32>) -> i32 {
    layer.and_then(|l| i32::try_from(l).ok()).unwrap_or(-1)
}

impl Plan {
    fn boxed(plan: indexcache::plan::Plan) -> Box<Self> {
        Box::new(Self(Arc::new(plan)))
    }
    fn slice(&self, first: u32, end: u32, promote: bool) -> Result<Box<Self>> {
        Ok(Self::boxed(self.0.slice(first, end, promote)?))
    }
    fn pattern(&self) -> String {
        self.0.letters()
    }
    fn fingerprint(&self) -> u64 {
        self.0.fingerprint()
    }
    fn topk(&self) -> u32 {
        self.0.model().row_width()
    }
    fn role(&self, layer: u32) -> Result<ffi::Role> {
        Ok(match self.0.role(layer)? {
            indexcache::plan::Role::None => ffi::Role::None,
            indexcache::plan::Role::Full => ffi::Role::Full,
            indexcache::plan::Role::Shared => ffi::Role::Shared,
        })
    }
    fn source_layer(&self, layer: u32) -> Result<i32> {
        Ok(layer_number(self.0.source(layer)?))
    }
    fn index_k_slot(&self, layer: u32) -> Result<i32> {
        Ok(layer_number(self.0.index_k_slot(layer)?))
    }
}

fn new_cache(context: &Context, plan: &Plan, lanes: usize, max_rows: usize) -> Result<Box<Cache>> {
    let shape = CacheShape { lanes, max_rows };
    // SAFETY: no buffer of the host's.
    let cache =
        unsafe { indexcache::cache::Cache::new(context.0.clone(), plan.0.clone(), shape, None) }?;
    Ok(Box::new(Cache { cache, scratch: Vec::new() }))
}

/// The first `size` bytes of `scratch`.
fn scratch(scratch: &mut Vec<u8>, size: usize) -> &mut [u8] {
    if scratch.len() < size {
        scratch.resize(size, 0);
    }
    &mut scratch[..size]
}

impl Cache {
    fn step_begin(&mut self, lane: usize, rows: usize, step_id: u64) -> Result<()> {
        Ok(self.cache.step_begin(lane, rows, step_id)?)
    }

    /// # Safety
    /// The indexer's tensors are valid, if the layer is Full.
    unsafe fn select(&mut self, lane: usize, layer: u32, indexer: &ffi::Indexer) -> Result<()> {
        // SAFETY: by this function's contract.
        let args = || unsafe { indexer.args() };
        let full = self.cache.plan().role(layer)? == indexcache::plan::Role::Full;
        let size = if full { self.cache.select_workspace(args()?)? } else { 0 };
        let workspace = scratch(&mut self.scratch, size).into();
        Ok(self.cache.select(lane, layer, args, workspace, Stream::DEFAULT)?)
    }

    /// # Safety
    /// `indices` is valid.
    unsafe fn publish(
        &mut self,
        lane: usize,
        layer: u32,
        indices: &ffi::Tensor,
        form: ffi::Form,
        table_id: u64,
    ) -> Result<()> {
        let form = match form {
            ffi::Form::Logical => IndexForm::Logical,
            ffi::Form::Slots => IndexForm::Slots,
            other => return Err(Error::invalid("form", "a Form", other.repr).into()),
        };
        // SAFETY: by this function's contract.
        let indices = unsafe { indices.need("indices") }?;
        Ok(self.cache.publish(lane, layer, Some(indices), form, table_id, Stream::DEFAULT)?)
    }

    fn indices(&self, lane: usize, layer: u32) -> Result<&[i32]> {
        let (t, _) = self.cache.indices(lane, layer)?;
        let n = t.shape().iter().product();
        // SAFETY: the cache's own memory is dense, lives as long as `self`, and is written under `&mut self` only.
        Ok(unsafe { std::slice::from_raw_parts(t.as_ptr().cast(), n) })
    }

    /// # Safety
    /// The attention's tensors are valid.
    unsafe fn attend(&mut self, lane: usize, layer: u32, a: &ffi::Attention) -> Result<()> {
        let (indices, form) = self.cache.indices_under(lane, layer, a.table_id)?;
        // SAFETY: by this function's contract.
        let args = unsafe {
            SparseAttentionArgs {
                q: a.q.need("q")?,
                kv: a.kv.need("kv")?,
                indices,
                form,
                map: KeyMapArgs {
                    block_table: a.block_table.get("block_table")?,
                    row_request: a.row_request.get("row_request")?,
                    row_start: a.row_start.get("row_start")?,
                    row_end: None,
                },
                row_topk: a.row_topk.get("row_topk")?,
                sink: a.sink.get("sink")?,
                softmax_scale: a.softmax_scale,
                out: a.out.need("out")?,
                lse: a.lse.get("lse")?,
                probs: a.probs.get("probs")?,
            }
        };
        let op = args.check()?;
        let context = self.cache.context();
        let workspace = scratch(&mut self.scratch, context.sparse_attention_workspace(&op)).into();
        Ok(context.sparse_attention(&op, workspace, Stream::DEFAULT)?)
    }
}
