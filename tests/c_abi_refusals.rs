//! Bad input at the C ABI: every function with every pointer NULL and misaligned, every descriptor of every age, every
//! tensor wrong in every way, and a panic inside. Nothing may crash, and the text must name function and argument.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]
#![allow(clippy::undocumented_unsafe_blocks)] // Wrong arguments are the point; what must hold is asserted.

use indexcache::capi::cache::*;
use indexcache::capi::context::*;
use indexcache::capi::ops::*;
use indexcache::capi::plan::*;
use indexcache::capi::search::*;
use indexcache::capi::table::*;
use indexcache::capi::types::*;
use indexcache::capi::*;
use std::ffi::{CStr, CString, c_char, c_void};
use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicUsize, Ordering};

/// What an argument is, and so how it can be wrong.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Kind {
    /// A number.
    Int,
    /// An aligned pointer that must be there.
    Required,
    /// An aligned pointer that may be NULL.
    Optional,
    /// Bytes that must be there, at any address.
    Bytes,
    /// Bytes that may be NULL in some calls, or an address that is not followed.
    Any,
}

struct Arg {
    name: &'static str,
    kind: Kind,
    value: u64,
}

type Invoke = Box<dyn Fn(&[u64]) -> Outcome>;

/// One function with valid arguments.
struct Call {
    name: &'static str,
    args: Vec<Arg>,
    invoke: Invoke,
}

/// What a function returned.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Outcome {
    Number(i32),
    Text(*const c_char),
    Nothing,
}

impl From<i32> for Outcome {
    fn from(v: i32) -> Self {
        Self::Number(v)
    }
}
impl From<u32> for Outcome {
    fn from(v: u32) -> Self {
        Self::Number(v.cast_signed())
    }
}
impl From<()> for Outcome {
    fn from((): ()) -> Self {
        Self::Nothing
    }
}
impl From<*const c_char> for Outcome {
    fn from(v: *const c_char) -> Self {
        Self::Text(v)
    }
}

impl Call {
    fn values(&self) -> Vec<u64> {
        self.args.iter().map(|a| a.value).collect()
    }

    fn run(&self) -> Outcome {
        (self.invoke)(&self.values())
    }

    /// With argument `i` replaced.
    fn run_with(&self, i: usize, value: u64) -> Outcome {
        let mut values = self.values();
        values[i] = value;
        (self.invoke)(&values)
    }

    /// With argument `i` replaced: must be refused as invalid, by a text that names function and argument.
    fn refuses(&self, i: usize, value: u64, why: &str) {
        let outcome = self.run_with(i, value);
        self.assert_refused(outcome, self.args[i].name, why);
    }

    fn assert_refused(&self, outcome: Outcome, argument: &str, why: &str) {
        let want = if self.name == "idxc_plan_layer_role" { -1 } else { IDXC_ERR_INVALID };
        let text = last_error_text();
        assert_eq!(outcome, Outcome::Number(want), "{} with {why} {argument}: {text}", self.name);
        let named =
            text.strip_prefix(self.name).and_then(|t| t.strip_prefix(": ")).unwrap_or_else(|| {
                panic!(
                    "{} with {why} {argument}: the text does not start with the function: {text}",
                    self.name
                )
            });
        let word = |c: char| !c.is_alphanumeric() && c != '_';
        assert!(
            named.split(word).any(|w| w == argument),
            "{} with {why} {argument}: the text does not name it: {text}",
            self.name
        );
    }
}

fn last_error_text() -> String {
    unsafe { CStr::from_ptr(idxc_last_error()) }.to_string_lossy().into_owned()
}

macro_rules! call {
    ($function:ident($($arg:ident: $kind:ident = $value:expr),* $(,)?)) => {
        Call {
            name: stringify!($function),
            args: vec![$(Arg { name: stringify!($arg), kind: Kind::$kind, value: $value as u64 }),*],
            #[allow(unused_unsafe, unused_mut, unused_variables)]
            invoke: Box::new(|values| {
                let mut values = values.iter().copied();
                $(let $arg = values.next().unwrap();)*
                unsafe { $function($($arg as _),*) }.into()
            }),
        }
    };
}

const ROWS: usize = 4;
const HEADS: usize = 2;
const DIM: usize = 16;
const TOKENS: usize = 100;
const TOPK: usize = 8;
const D: usize = 8;

/// Something that lives as long as the test process: C arguments are addresses.
fn keep<T>(value: T) -> *mut T {
    Box::into_raw(Box::new(value))
}

fn tensor(code: u8, bits: u8, shape: &[usize]) -> *mut idxc_tensor {
    let bytes = shape.iter().product::<usize>() * usize::from(bits) / 8;
    let data = vec![0u64; bytes.div_ceil(8)].leak().as_mut_ptr().cast();
    let shape = shape.iter().map(|&n| n as i64).collect::<Vec<_>>().leak();
    keep(idxc_tensor {
        data,
        device: idxc_device { device_type: IDXC_DEVICE_CPU, device_id: 0 },
        ndim: shape.len() as i32,
        dtype: idxc_dtype { code, bits, lanes: 1 },
        shape: shape.as_mut_ptr(),
        strides: null_mut(),
        byte_offset: 0,
    })
}

fn f32s(shape: &[usize]) -> *mut idxc_tensor {
    tensor(IDXC_DTYPE_FLOAT, 32, shape)
}

fn i32s(values: &[i32], shape: &[usize]) -> *mut idxc_tensor {
    let t = tensor(IDXC_DTYPE_INT, 32, shape);
    unsafe { std::slice::from_raw_parts_mut((*t).data.cast::<i32>(), values.len()) }
        .copy_from_slice(values);
    t
}

/// A descriptor with `struct_size` set and zeros after it.
fn desc<T>(fill: impl FnOnce(&mut T)) -> *mut T {
    let memory = keep(unsafe { std::mem::zeroed::<T>() });
    unsafe {
        memory.cast::<u32>().write(size_of::<T>() as u32);
        fill(&mut *memory);
    }
    memory
}

fn made<T>(create: impl FnOnce(*mut *mut T) -> idxc_status) -> *mut T {
    let mut out = null_mut();
    let status = create(&raw mut out);
    assert_eq!(status, IDXC_OK, "{}", last_error_text());
    assert!(!out.is_null());
    out
}

/// A file that does not exist, of this call's own.
fn journal() -> *const c_char {
    static NUMBER: AtomicUsize = AtomicUsize::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let name = format!("refusals-{}-{number}.jsonl", std::process::id());
    let path = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let _ = std::fs::remove_file(&path);
    CString::new(path.to_str().unwrap()).unwrap().into_raw()
}

struct World {
    calls: Vec<Call>,
    /// Function, argument that holds the descriptor (or is the tensor), name in messages, the tensor, must be there.
    tensors: Vec<(&'static str, &'static str, *mut idxc_tensor)>,
    /// Function, descriptor, field's name, the field, whether the call needs it.
    fields: Vec<(&'static str, &'static str, *mut *const idxc_tensor, bool)>,
    /// Struct arguments: function, argument, its address, its size, written by the library.
    structs: Vec<(&'static str, &'static str, *mut u8, usize, bool)>,
}

/// Every function with valid arguments, in an order in which all of them succeed.
fn world() -> World {
    let context = made(|out| unsafe { idxc_context_create(null(), out) });
    let model = desc::<idxc_model_desc>(|d| {
        (d.layers, d.topk, d.mtp_layers, d.flags) = (3, TOPK as i32, 1, IDXC_FLAG_MTP_SHARES);
    });
    let plan = made(|out| unsafe { idxc_plan_from_pattern(model, c"FSF".as_ptr(), out) });
    let cache_desc = desc::<idxc_cache_desc>(|d| (d.lanes, d.max_rows) = (2, ROWS as i32));
    let cache = made(|out| unsafe { idxc_cache_create(context, plan, cache_desc, out) });

    // A second cache whose lane holds an MTP layer's indices, for idxc_step_carry.
    let draft = made(|out| unsafe { idxc_cache_create(context, plan, cache_desc, out) });
    let minus = i32s(&[-1; ROWS * TOPK], &[ROWS, TOPK]);
    assert_eq!(unsafe { idxc_step_begin(draft, 0, ROWS as i32, 1) }, IDXC_OK);
    assert_eq!(unsafe { idxc_publish(draft, 0, 3, minus, 0, 0, null_mut()) }, IDXC_OK);
    let from = i32s(&[1, 3], &[2]);

    let pages = tensor(IDXC_DTYPE_UINT, 8, &[2, 64 * (DIM + 4)]);
    let slots = i32s(&(0..TOKENS as i32).collect::<Vec<_>>(), &[TOKENS]);
    let kw = desc::<idxc_index_k_write_desc>(|d| {
        (d.k, d.slots, d.pages) = (f32s(&[TOKENS, DIM]), slots, pages)
    });
    let q8 = tensor(IDXC_DTYPE_FLOAT8_E4M3FN, 8, &[ROWS, HEADS, DIM]);
    let weights = f32s(&[ROWS, HEADS]);
    let qq = desc::<idxc_index_q_quantize_desc>(|d| {
        (d.q, d.weights) = (f32s(&[ROWS, HEADS, DIM]), f32s(&[ROWS, HEADS]));
        (d.q_out, d.weights_out) = (q8, weights);
    });
    let row_end = i32s(&[TOKENS as i32; ROWS], &[ROWS]);
    let table = i32s(&[0, 1], &[1, 2]);
    let request = i32s(&[0; ROWS], &[ROWS]);
    let paged = |d: &mut idxc_indexer_desc| {
        (d.q, d.weights, d.k, d.block_table) = (q8, weights, pages, table);
        (d.row_request, d.row_end) = (request, row_end);
    };
    let select = desc::<idxc_indexer_desc>(paged);
    let paged_logits = desc::<idxc_indexer_desc>(paged);
    let flat_logits = desc::<idxc_indexer_desc>(|d| {
        (d.q, d.weights, d.k) = (q8, weights, tensor(IDXC_DTYPE_FLOAT8_E4M3FN, 8, &[TOKENS, DIM]));
        (d.k_scale, d.row_start, d.row_end) = (f32s(&[TOKENS]), i32s(&[0; ROWS], &[ROWS]), row_end);
    });
    let logits = f32s(&[ROWS, 128]);
    let picked = i32s(&[0; ROWS * TOPK], &[ROWS, TOPK]);
    let topk = desc::<idxc_topk_desc>(|d| {
        (d.logits, d.row_start, d.row_end, d.indices) =
            (logits, i32s(&[0; ROWS], &[ROWS]), row_end, picked);
    });
    let to_slots = desc::<idxc_indices_to_slots_desc>(|d| {
        (d.indices, d.block_table, d.row_request) = (picked, table, request);
        (d.slots, d.page_size) = (i32s(&[0; ROWS * TOPK], &[ROWS, TOPK]), 64);
    });
    let kv_pages = f32s(&[2, 64, D]);
    let kv = desc::<idxc_kv_write_desc>(|d| {
        (d.kv, d.slots, d.pages) = (f32s(&[TOKENS, D]), slots, kv_pages)
    });
    let attention = |d: &mut idxc_attention_desc| {
        (d.q, d.kv, d.block_table, d.row_request) =
            (f32s(&[ROWS, HEADS, D]), kv_pages, table, request);
        (d.row_topk, d.sink) = (i32s(&[TOPK as i32; ROWS], &[ROWS]), f32s(&[HEADS]));
        (d.out, d.lse, d.softmax_scale) = (f32s(&[ROWS, HEADS, D]), f32s(&[ROWS, HEADS]), 1.0);
    };
    let attend = desc::<idxc_attention_desc>(attention);
    let stateless = desc::<idxc_attention_desc>(attention);
    let (overlap_b, overlap) = (i32s(&[-1; ROWS * TOPK], &[ROWS, TOPK]), f32s(&[ROWS]));
    let exported = i32s(&[0; ROWS * TOPK], &[ROWS, TOPK]);
    let distill = desc::<idxc_distill_desc>(|d| {
        (d.q, d.k, d.weights) =
            (f32s(&[ROWS, HEADS, DIM]), f32s(&[TOKENS, DIM]), f32s(&[ROWS, HEADS]));
        (d.row_start, d.row_end) = (i32s(&[0; ROWS], &[ROWS]), row_end);
        d.indices = i32s(&[0; ROWS * TOPK], &[ROWS, TOPK]);
        (d.attention_q, d.kv) = (f32s(&[ROWS, HEADS, D]), f32s(&[TOKENS, D]));
        (d.lse, d.loss) = (f32s(&[ROWS, HEADS]), f32s(&[1]));
        (d.grad_q, d.grad_k) = (f32s(&[ROWS, HEADS, DIM]), f32s(&[TOKENS, DIM]));
        (d.grad_weights, d.softmax_scale, d.layer_weight) = (f32s(&[ROWS, HEADS]), 1.0, 1.0);
    });

    let size = keep(0usize);
    let workspace_size = 1 << 22;
    let workspace = vec![0u8; workspace_size].leak().as_mut_ptr();
    let text = vec![0u8; 64].leak().as_mut_ptr();
    let types = vec![c"full".as_ptr(), c"shared".as_ptr(), c"full".as_ptr()].leak().as_ptr();
    let sources = vec![0i64, 2].leak().as_ptr();
    let json = br#"{"model_type": "deepseek_v32", "num_hidden_layers": 3, "index_topk": 8, "index_n_heads": 2,
        "index_head_dim": 128, "index_topk_pattern": "FSF"}"#;
    let context_desc = desc::<idxc_context_desc>(|d| d.threads = 1);
    let context_info = desc::<idxc_context_info>(|_| ());
    let plan_info = desc::<idxc_plan_info>(|_| ());
    let layer_info = desc::<idxc_layer_info>(|_| ());
    let lane_info = desc::<idxc_lane_info>(|_| ());
    let out_tensor = keep(unsafe { std::mem::zeroed::<idxc_tensor>() });
    let out = keep(null_mut::<c_void>());
    let stream = null_mut::<c_void>();
    let dead_context = made(|out| unsafe { idxc_context_create(context_desc, out) });
    let dead_plan = made(|out| unsafe { idxc_plan_from_pattern(model, c"FSF".as_ptr(), out) });
    let dead_cache = made(|out| unsafe { idxc_cache_create(context, plan, cache_desc, out) });

    let search_desc = desc::<idxc_search_desc>(|d| {
        (d.layers, d.topk) = (3, TOPK as i32);
        (d.model, d.calibration) = (c"model".as_ptr(), c"rows".as_ptr());
        (d.row_lengths, d.row_lengths_count) = (keep([TOKENS as i64]).cast(), 1);
    });
    let new_search = || made(|out| unsafe { idxc_search_create(search_desc, out) });
    let (search, dead_search, saved) = (new_search(), new_search(), new_search());
    let (journal, other_journal) = (journal(), journal());
    assert_eq!(unsafe { idxc_search_save(saved, other_journal) }, IDXC_OK);
    unsafe { idxc_search_destroy(saved) };
    let candidate = desc::<idxc_search_candidate>(|_| ());
    let result = vec![0u8; 4096].leak().as_mut_ptr();

    let mut calls = vec![
        call!(idxc_version()),
        call!(idxc_status_name(status: Int = 3)),
        call!(idxc_last_error()),
        Call {
            name: "idxc_set_log_callback",
            args: vec![
                Arg { name: "callback", kind: Kind::Any, value: 0 },
                Arg { name: "user", kind: Kind::Any, value: 0 },
            ],
            invoke: Box::new(|a| unsafe { idxc_set_log_callback(None, a[1] as _) }.into()),
        },
        call!(idxc_context_create(desc: Optional = context_desc, out: Required = out)),
        call!(idxc_context_destroy(context: Any = dead_context)),
        call!(idxc_context_get_info(context: Required = context, info: Required = context_info)),
        call!(idxc_plan_from_pattern(model: Required = model, pattern: Bytes = c"FSF".as_ptr(), out: Required = out)),
        call!(idxc_plan_from_indexer_types(model: Required = model, types: Required = types, count: Int = 3,
            out: Required = out)),
        call!(idxc_plan_from_freq(model: Required = model, dialect: Int = IDXC_DIALECT_HF, freq: Int = 2,
            offset: Optional = keep(2i64), out: Required = out)),
        call!(idxc_plan_from_source_layers(model: Required = model, layers: Required = sources, count: Int = 2,
            out: Required = out)),
        call!(idxc_plan_from_hf_config(json: Bytes = json.as_ptr(), size: Int = json.len(), out: Required = out)),
        call!(idxc_plan_slice(plan: Required = plan, first: Int = 0, end: Int = 2, flags: Int = 0,
            out: Required = out)),
        call!(idxc_plan_destroy(plan: Any = dead_plan)),
        call!(idxc_plan_get_info(plan: Required = plan, info: Required = plan_info)),
        call!(idxc_plan_layer_role(plan: Required = plan, layer: Int = 1)),
        call!(idxc_plan_layer_get_info(plan: Required = plan, layer: Int = 1, info: Required = layer_info)),
        call!(idxc_plan_export(plan: Required = plan, format: Int = IDXC_EXPORT_PATTERN, dialect: Int = 0,
            buffer: Bytes = text, capacity: Int = 64, size: Required = size)),
        call!(idxc_cache_size(plan: Required = plan, desc: Required = cache_desc, size: Required = size)),
        call!(idxc_cache_create(context: Required = context, plan: Required = plan, desc: Required = cache_desc,
            out: Required = out)),
        call!(idxc_cache_destroy(cache: Any = dead_cache)),
        call!(idxc_step_begin(cache: Required = cache, lane: Int = 0, rows: Int = ROWS, step_id: Int = 1)),
        call!(idxc_step_carry(cache: Required = draft, lane: Int = 0, from: Required = from, step_id: Int = 2,
            stream: Any = stream)),
        call!(idxc_select_workspace(cache: Required = cache, desc: Required = select, size: Required = size)),
        call!(idxc_select(cache: Required = cache, lane: Int = 0, layer: Int = 0, desc: Required = select,
            workspace: Bytes = workspace, workspace_size: Int = workspace_size, stream: Any = stream)),
        call!(idxc_slot(cache: Required = cache, lane: Int = 0, out: Required = out_tensor)),
        call!(idxc_publish(cache: Required = cache, lane: Int = 0, layer: Int = 0, indices: Optional = minus,
            form: Int = IDXC_FORM_LOGICAL, table_id: Int = 0, stream: Any = stream)),
        call!(idxc_indices(cache: Required = cache, lane: Int = 0, layer: Int = 1, out: Required = out_tensor)),
        call!(idxc_export(cache: Required = cache, lane: Int = 0, layer: Int = 1, out: Required = exported,
            stream: Any = stream)),
        call!(idxc_lane_get_info(cache: Required = cache, lane: Int = 0, info: Required = lane_info)),
        call!(idxc_attend_workspace(cache: Required = cache, desc: Required = attend, size: Required = size)),
        call!(idxc_attend(cache: Required = cache, lane: Int = 0, layer: Int = 1, desc: Required = attend,
            workspace: Bytes = workspace, workspace_size: Int = workspace_size, stream: Any = stream)),
        call!(idxc_index_k_write(context: Required = context, desc: Required = kw, stream: Any = stream)),
        call!(idxc_index_q_quantize(context: Required = context, desc: Required = qq, stream: Any = stream)),
        call!(idxc_indexer_logits(context: Required = context, desc: Required = flat_logits,
            logits: Required = logits, stream: Any = stream)),
        call!(idxc_paged_indexer_logits(context: Required = context, desc: Required = paged_logits,
            logits: Required = logits, stream: Any = stream)),
        call!(idxc_topk_workspace(context: Required = context, desc: Required = topk, size: Required = size)),
        call!(idxc_topk(context: Required = context, desc: Required = topk, workspace: Any = workspace,
            workspace_size: Int = workspace_size, stream: Any = stream)),
        call!(idxc_indices_to_slots(context: Required = context, desc: Required = to_slots, stream: Any = stream)),
        call!(idxc_kv_write(context: Required = context, desc: Required = kv, stream: Any = stream)),
        call!(idxc_sparse_attention_workspace(context: Required = context, desc: Required = stateless,
            indices: Required = picked, form: Int = IDXC_FORM_LOGICAL, size: Required = size)),
        call!(idxc_sparse_attention(context: Required = context, desc: Required = stateless,
            indices: Required = picked, form: Int = IDXC_FORM_LOGICAL, workspace: Bytes = workspace,
            workspace_size: Int = workspace_size, stream: Any = stream)),
        call!(idxc_indices_overlap(context: Required = context, a: Required = picked, b: Required = overlap_b,
            overlap: Required = overlap, stream: Any = stream)),
        call!(idxc_search_create(desc: Required = search_desc, out: Required = out)),
        call!(idxc_search_next(search: Required = search, candidate: Required = candidate)),
        call!(idxc_search_report(search: Required = search, pattern: Bytes = c"FFF".as_ptr(), loss: Int = 1)),
        call!(idxc_search_save(search: Required = search, path: Bytes = journal)),
        call!(idxc_search_resume(desc: Required = search_desc, path: Bytes = other_journal, out: Required = out)),
        call!(idxc_search_result(search: Required = search, buffer: Bytes = result, capacity: Int = 4096,
            size: Required = size)),
        call!(idxc_search_destroy(search: Any = dead_search)),
        call!(idxc_distill_workspace(context: Required = context, desc: Required = distill, size: Required = size)),
        call!(idxc_distill(context: Required = context, desc: Required = distill, workspace: Bytes = workspace,
            workspace_size: Int = workspace_size, stream: Any = stream)),
    ];
    // A search keeps its journal to itself: the one that was made goes before the next call.
    let resume = calls.iter_mut().find(|c| c.name == "idxc_search_resume").unwrap();
    let invoke = std::mem::replace(&mut resume.invoke, Box::new(|_| Outcome::Nothing));
    resume.invoke = Box::new(move |args| {
        let outcome = invoke(args);
        if outcome == Outcome::Number(IDXC_OK) {
            unsafe { idxc_search_destroy(*(args[2] as *mut *mut idxc_search)) };
        }
        outcome
    });

    let mut fields = Vec::new();
    macro_rules! fields {
        ($functions:expr, $desc:expr, $($field:ident $need:literal),*) => {
            for function in $functions {
                $(fields.push((function, stringify!($field), unsafe { &raw mut (*$desc).$field }, $need));)*
            }
        };
    }
    fields!(["idxc_index_k_write"], kw, k true, slots true, pages true);
    fields!(["idxc_index_q_quantize"], qq, q true, weights true, q_out true, weights_out true);
    fields!(["idxc_select", "idxc_select_workspace"], select, q true, weights true, k true, block_table false,
        row_request false, row_end true);
    fields!(["idxc_paged_indexer_logits"], paged_logits, q true, weights true, k true, block_table true,
        row_request false, row_end true);
    fields!(["idxc_indexer_logits"], flat_logits, q true, weights true, k true, k_scale true, row_start false,
        row_end false);
    fields!(["idxc_topk", "idxc_topk_workspace"], topk, logits true, row_start false, row_end false, indices true);
    fields!(["idxc_indices_to_slots"], to_slots, indices true, block_table false, row_request false, slots true);
    fields!(["idxc_kv_write"], kv, kv true, slots true, pages true);
    fields!(["idxc_attend", "idxc_attend_workspace"], attend, q true, kv true, block_table false, row_request false,
        row_topk false, sink false, out true, lse false);
    fields!(["idxc_sparse_attention", "idxc_sparse_attention_workspace"], stateless, q true, kv true,
        block_table false, row_request false, row_topk false, sink false, out true, lse false);

    fields!(["idxc_distill", "idxc_distill_workspace"], distill, q true, k true, weights true, row_start false,
        row_end false, indices false, attention_q true, kv true, lse true, loss true, grad_q false, grad_k false,
        grad_weights false);

    let mut tensors: Vec<_> =
        fields.iter().map(|&(f, name, field, _)| (f, name, unsafe { *field }.cast_mut())).collect();
    tensors.extend([
        ("idxc_step_carry", "from", from),
        ("idxc_publish", "indices", minus),
        ("idxc_export", "out", exported),
        ("idxc_indexer_logits", "logits", logits),
        ("idxc_paged_indexer_logits", "logits", logits),
        ("idxc_sparse_attention", "indices", picked),
        ("idxc_sparse_attention_workspace", "indices", picked),
        ("idxc_indices_overlap", "a", picked),
        ("idxc_indices_overlap", "b", overlap_b),
        ("idxc_indices_overlap", "overlap", overlap),
    ]);

    let mut structs = Vec::new();
    for call in &calls {
        for arg in &call.args {
            let sized = |t: usize, written| (call.name, arg.name, arg.value as *mut u8, t, written);
            match (arg.name, call.name) {
                ("model", _) => structs.push(sized(size_of::<idxc_model_desc>(), false)),
                ("desc", _) => {
                    let size = unsafe { *(arg.value as *const u32) } as usize;
                    structs.push(sized(size, false));
                }
                ("info" | "candidate", _) => {
                    let size = unsafe { *(arg.value as *const u32) } as usize;
                    structs.push(sized(size, true));
                }
                _ => {}
            }
        }
    }
    World { calls, tensors, fields, structs }
}

impl World {
    fn call(&self, name: &str) -> &Call {
        self.calls.iter().find(|c| c.name == name).unwrap()
    }

    /// Every call as it should be, in order.
    fn baseline(&self) {
        for call in &self.calls {
            let outcome = call.run();
            let good = match outcome {
                Outcome::Number(v) => {
                    v == match call.name {
                        "idxc_version" => IDXC_ABI_VERSION as i32,
                        "idxc_plan_layer_role" => IDXC_ROLE_SHARED,
                        _ => IDXC_OK,
                    }
                }
                Outcome::Text(text) => !text.is_null(),
                Outcome::Nothing => true,
            };
            assert!(good, "{} with valid arguments: {outcome:?}: {}", call.name, last_error_text());
        }
    }
}

/// `(function, [(argument, is a pointer)])` of each prototype in the public header.
fn prototypes() -> Vec<(String, Vec<(String, bool)>)> {
    let path =
        std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("include/indexcache/indexcache.h");
    let header = std::fs::read_to_string(path).unwrap();
    let table = header.split("struct idxc_api {").nth(1).unwrap();
    let mut found = Vec::new();
    for line in table.lines().filter(|l| l.contains("(*idxc_")) {
        let (name, rest) = line.split_once("(*").unwrap().1.split_once(")(").unwrap();
        let args = rest.trim_end_matches(");").split(", ").filter(|a| *a != "void").map(|a| {
            let name = a.rsplit([' ', '*']).next().unwrap().to_owned();
            (name, a.contains('*') || a.contains("callback"))
        });
        found.push((name.to_owned(), args.collect()));
    }
    found
}

/// The list above is the header's: nothing new goes untested.
#[test]
fn every_argument_of_every_function_is_here() {
    let here: Vec<(String, Vec<(String, bool)>)> = world()
        .calls
        .iter()
        .map(|c| {
            let args = c.args.iter().map(|a| (a.name.to_owned(), a.kind != Kind::Int));
            (c.name.to_owned(), args.collect())
        })
        .collect();
    assert_eq!(here, prototypes());
    assert_eq!(here.iter().map(|(n, _)| n.as_str()).collect::<Vec<_>>(), NAMES);
}

#[test]
fn null_in_every_pointer() {
    let world = world();
    world.baseline();
    for call in &world.calls {
        for (i, arg) in call.args.iter().enumerate() {
            if matches!(arg.kind, Kind::Required | Kind::Bytes) {
                call.refuses(i, 0, "NULL");
            }
        }
        // All at once, and with them all numbers zero.
        let needs = call.args.iter().any(|a| matches!(a.kind, Kind::Required | Kind::Bytes));
        for zero in [false, true] {
            let values: Vec<u64> = call
                .args
                .iter()
                .map(|a| if a.kind == Kind::Int && !zero { a.value } else { 0 })
                .collect();
            let outcome = (call.invoke)(&values);
            if needs {
                assert_ne!(outcome, Outcome::Number(IDXC_OK), "{} with all NULL", call.name);
            }
        }
    }
}

#[test]
fn null_in_every_field() {
    let world = world();
    world.baseline();
    for &(function, name, field, needed) in &world.fields {
        let call = world.call(function);
        let was = unsafe { field.replace(null()) };
        let outcome = call.run();
        if needed {
            call.assert_refused(outcome, name, "NULL");
        }
        unsafe { field.write(was) };
    }
}

#[test]
fn misaligned_pointers() {
    let world = world();
    world.baseline();
    for call in &world.calls {
        for (i, arg) in call.args.iter().enumerate() {
            if matches!(arg.kind, Kind::Required | Kind::Optional) {
                call.refuses(i, arg.value | 1, "misaligned");
            }
        }
    }
}

/// Outputs are cleared, so that nobody destroys what was never made.
#[test]
fn failed_constructors_leave_null() {
    let world = world();
    for call in
        world.calls.iter().filter(|c| c.args.len() > 1 && c.args.last().unwrap().name == "out")
    {
        let Some(out) =
            call.args.last().filter(|_| call.name != "idxc_slot" && call.name != "idxc_indices")
        else {
            continue;
        };
        let out = out.value as *mut *mut c_void;
        unsafe { out.write(8 as *mut c_void) };
        let mut values = call.values();
        if call.name == "idxc_context_create" {
            unsafe { (*(values[0] as *mut idxc_context_desc)).backend = 77 };
        } else {
            values[0] = 0;
        }
        assert_ne!((call.invoke)(&values), Outcome::Number(IDXC_OK), "{}", call.name);
        assert!(unsafe { *out }.is_null(), "{}", call.name);
    }
}

#[test]
fn struct_sizes_of_any_age() {
    let world = world();
    world.baseline();
    for &(function, name, memory, size, written) in &world.structs {
        let call = world.call(function);
        let i = call.args.iter().position(|a| a.name == name).unwrap();
        // Steps cannot be begun twice, and handles are made anew: only refusals and acceptance matter here.
        let accepted = |outcome: Outcome, what: &str| {
            assert_eq!(
                outcome,
                Outcome::Number(IDXC_OK),
                "{function}, {name} {what}: {}",
                last_error_text()
            );
        };
        let original = unsafe { std::slice::from_raw_parts(memory, size) }.to_vec();
        let mut large = vec![0u64; 4096 / 8];
        let bytes = large.as_mut_ptr().cast::<u8>();
        let set = |struct_size: u32, tail: u8| unsafe {
            bytes.write_bytes(0, 4096);
            bytes.copy_from_nonoverlapping(original.as_ptr(), size);
            bytes.add(size).write_bytes(tail, 64);
            bytes.cast::<u32>().write(struct_size);
            call.run_with(i, bytes as u64)
        };
        for garbage in [0, 1, 4, 7, 12, 4097, 4104, 0x8000_0000, u32::MAX] {
            call.assert_refused(set(garbage, 0), name, "a garbage struct_size in");
        }
        let longer = size as u32 + 64;
        accepted(set(longer, 0), "longer, with a tail of zeros");
        if written {
            accepted(set(longer, 0xaa), "longer, written by the library");
            assert!(unsafe { *bytes.add(size) } == 0xaa, "{function} wrote past what it knows");
        } else {
            call.assert_refused(set(longer, 1), name, "a longer and unknown");
        }
        // An older, shorter struct: what lies behind it is not looked at, and not written.
        unsafe {
            bytes.copy_from_nonoverlapping(original.as_ptr(), size);
            bytes.cast::<u32>().write(8);
            bytes.add(8).write_bytes(0xaa, size - 8);
        }
        let outcome = call.run_with(i, bytes as u64);
        if written || function == "idxc_context_create" {
            accepted(outcome, "of 8 bytes");
        } else {
            assert_ne!(
                outcome,
                Outcome::Number(IDXC_OK),
                "{function}: the rest of {name} is not optional"
            );
        }
        let tail = unsafe { std::slice::from_raw_parts(bytes.add(8), size - 8) };
        assert!(tail.iter().all(|&b| b == 0xaa), "{function} wrote behind a short {name}");

        if !written {
            unsafe {
                bytes.copy_from_nonoverlapping(original.as_ptr(), size);
                bytes.cast::<u32>().add(1).write(0x8000_0000);
            }
            call.assert_refused(call.run_with(i, bytes as u64), name, "an unknown flag in");
            assert!(last_error_text().contains("flags"), "{}", last_error_text());
        }
    }
}

/// A descriptor from before its last fields: they get their defaults, and the call works.
#[test]
fn older_descriptors_work() {
    let world = world();
    world.baseline();
    let call = world.call("idxc_topk");
    // Without `row_start` and `row_end` in the middle nothing is older; a context's `threads` and a cache's `buffer` are.
    let create = world.call("idxc_cache_create");
    let d = create.args[2].value as *mut idxc_cache_desc;
    unsafe {
        (*d).struct_size = 16; // Before `buffer`, which is garbage to it.
        (*d).buffer = std::ptr::dangling();
    }
    assert_eq!(create.run(), Outcome::Number(IDXC_OK), "{}", last_error_text());
    assert_eq!(call.run(), Outcome::Number(IDXC_OK));
}

/// Each way in which a tensor can be wrong, tried on every tensor of every function.
#[test]
fn wrong_tensors() {
    let world = world();
    world.baseline();
    static NEGATIVE: [i64; 6] = [-1; 6];
    static HUGE: [i64; 6] = [i64::MAX; 6];
    static MISALIGNED: [i64; 8] = [1; 8];
    type Wrong = (&'static str, fn(&mut idxc_tensor));
    let wrongs: [Wrong; 15] = [
        ("an unknown device_type in", |t| t.device.device_type = 99),
        ("another device in", |t| {
            t.device = idxc_device { device_type: IDXC_DEVICE_CUDA, device_id: 0 }
        }),
        ("an unknown dtype in", |t| t.dtype.code = 77),
        ("vector lanes in", |t| t.dtype.lanes = 4),
        ("a wrong dtype in", |t| {
            t.dtype = idxc_dtype { code: IDXC_DTYPE_FLOAT, bits: 16, lanes: 1 }
        }),
        ("negative ndim in", |t| t.ndim = -1),
        ("ndim 0 in", |t| t.ndim = 0),
        ("too many ndim in", |t| t.ndim = 6),
        ("ndim from garbage in", |t| t.ndim = i32::MAX),
        ("no shape in", |t| t.shape = null_mut()),
        ("a negative shape in", |t| t.shape = NEGATIVE.as_ptr().cast_mut()),
        ("a huge shape in", |t| t.shape = HUGE.as_ptr().cast_mut()),
        ("a misaligned shape in", |t| {
            t.shape = MISALIGNED.as_ptr().cast::<u8>().wrapping_add(1).cast_mut().cast()
        }),
        ("negative strides in", |t| t.strides = NEGATIVE.as_ptr().cast_mut()),
        ("a huge byte_offset in", |t| t.byte_offset = u64::MAX - 3),
    ];
    for &(function, name, tensor) in &world.tensors {
        let call = world.call(function);
        let was = unsafe { *tensor };
        for (why, spoil) in wrongs {
            spoil(unsafe { &mut *tensor });
            let outcome = call.run();
            unsafe { *tensor = was };
            // A size query looks at shapes only, so an offset or a device's memory cannot be wrong there.
            if function.ends_with("_workspace") && why.contains("byte_offset") {
                continue;
            }
            let text = last_error_text();
            assert_eq!(
                outcome,
                Outcome::Number(IDXC_ERR_INVALID),
                "{function} with {why} {name}: {text}"
            );
            assert!(text.starts_with(function), "{function} with {why} {name}: {text}");
        }
        if !function.ends_with("_workspace") {
            unsafe { (*tensor).data = null_mut() };
            call.assert_refused(call.run(), name, "no memory in");
            unsafe { *tensor = was };
            unsafe { (*tensor).data = was.data.cast::<u8>().wrapping_add(1).cast() };
            let outcome = call.run();
            if was.dtype.bits > 8 {
                call.assert_refused(outcome, name, "misaligned memory in");
            }
            unsafe { *tensor = was };
        }
    }
    world.call("idxc_step_begin").run_with(3, 99);
    for call in world.calls.iter().filter(|c| !c.name.ends_with("_destroy")) {
        if !["idxc_step_begin", "idxc_step_carry"].contains(&call.name) {
            let outcome = call.run();
            let good = !matches!(outcome, Outcome::Number(v) if v != IDXC_OK)
                || call.args.len() < 2
                || call.name == "idxc_plan_layer_role";
            assert!(good, "{} afterwards: {outcome:?}: {}", call.name, last_error_text());
        }
    }
}

/// Numbers out of range: refused, whatever they are.
#[test]
fn wrong_numbers() {
    let world = world();
    world.baseline();
    for call in &world.calls {
        for (i, arg) in call.args.iter().enumerate() {
            if arg.kind != Kind::Int || call.name == "idxc_status_name" {
                continue;
            }
            // Counts beside a pointer are promises that nobody can check; zero is checkable.
            let values: &[i64] = match arg.name {
                "lane" | "layer" | "first" | "end" | "form" | "dialect" | "format" => {
                    &[-1, 99, i32::MIN as i64, i32::MAX as i64]
                }
                "rows" => &[-1, ROWS as i64 + 1, i32::MAX as i64],
                "freq" => &[0, -1, i64::MIN],
                "flags" => &[2, 0x8000_0000],
                "workspace_size" | "capacity" | "count" | "size" => &[0],
                "step_id" | "table_id" => &[],
                "loss" => &[2], // Not what was reported before.
                other => panic!("{}: {other} is new: say how it can be wrong", call.name),
            };
            for &value in values {
                // `dialect` only counts where a frequency is meant; the CPU's top-k needs no workspace.
                if (call.name, arg.name) == ("idxc_plan_export", "dialect")
                    || (call.name, arg.name) == ("idxc_topk", "workspace_size")
                {
                    continue;
                }
                let outcome = call.run_with(i, value as u64);
                assert_ne!(
                    outcome,
                    Outcome::Number(IDXC_OK),
                    "{} with {} = {value}",
                    call.name,
                    arg.name
                );
            }
        }
    }
    let twice = world.call("idxc_step_begin").run();
    assert_eq!(twice, Outcome::Number(IDXC_ERR_INVALID), "the same step again");
    assert!(idxc_get_api(0).is_null() && idxc_get_api(2).is_null());
}

/// A panic inside any function becomes its status (or its fallback), prints nothing, and hurts nothing.
#[cfg(debug_assertions)]
#[test]
fn panics_become_statuses_in_silence() {
    const CHILD: &str = "INDEXCACHE_TEST_PANICS";
    if std::env::var_os(CHILD).is_none() {
        let output = std::process::Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "panics_become_statuses_in_silence",
                "--nocapture",
                "--test-threads=1",
            ])
            .env(CHILD, "1")
            .output()
            .unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{}{stderr}", String::from_utf8_lossy(&output.stdout));
        assert_eq!(stderr, "", "the library printed");
        return;
    }
    let world = world();
    for call in &world.calls {
        testing::arm_panic();
        let outcome = call.run();
        match call.name {
            "idxc_version" => assert_eq!(outcome, Outcome::Number(IDXC_ABI_VERSION as i32)),
            "idxc_plan_layer_role" => assert_eq!(outcome, Outcome::Number(-1)),
            "idxc_status_name" | "idxc_last_error" => {
                let Outcome::Text(text) = outcome else { panic!("{}", call.name) };
                assert!(!text.is_null());
            }
            name if name.ends_with("_destroy") => assert_eq!(outcome, Outcome::Nothing),
            name => {
                assert_eq!(outcome, Outcome::Number(IDXC_ERR_PANIC), "{name}");
                let text = last_error_text();
                assert!(text.starts_with(name) && text.contains("armed by a test"), "{text}");
            }
        }
    }
    testing::arm_panic();
    assert!(idxc_get_api(IDXC_ABI_VERSION).is_null());
    assert!(!idxc_get_api(IDXC_ABI_VERSION).is_null());
    world.baseline();
}
