//! Bugs that servers shipped with cross-layer index reuse, each one sequence of calls of the C ABI. Every sequence is
//! longer than top-k: with fewer tokens a row selects them all, reuse is exact, and such a test proves nothing.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]
#![allow(clippy::undocumented_unsafe_blocks)] // All calls are C calls with live arguments.

use indexcache::capi::cache::*;
use indexcache::capi::context::*;
use indexcache::capi::ops::*;
use indexcache::capi::plan::*;
use indexcache::capi::types::*;
use indexcache::capi::*;
use std::ffi::{CStr, CString, c_char, c_void};
use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicUsize, Ordering};

const TOKENS: usize = 200;
const TOPK: usize = 8;
const ROWS: usize = 6;
const DIM: usize = 16;
const NONE: i32 = -1;

fn text() -> String {
    unsafe { CStr::from_ptr(idxc_last_error()) }.to_string_lossy().into_owned()
}

#[track_caller]
fn ok(status: idxc_status) {
    assert_eq!(status, IDXC_OK, "{}", text());
}

/// The call fails this way, and its text says this.
#[track_caller]
fn fails(status: idxc_status, with: idxc_status, saying: &str) {
    assert_eq!(status, with, "{}", text());
    assert!(text().contains(saying), "{}", text());
}

/// A descriptor with defaults.
fn desc<T: Copy>(fill: impl FnOnce(&mut T)) -> T {
    let mut value = unsafe { std::mem::zeroed::<T>() };
    unsafe { (&raw mut value).cast::<u32>().write(size_of::<T>() as u32) };
    fill(&mut value);
    value
}

/// Memory with its shape, as the C ABI takes it.
struct Owned<T> {
    values: Vec<T>,
    c: idxc_tensor,
}

trait Element: Copy {
    const CODE: u8;
}
impl Element for i32 {
    const CODE: u8 = IDXC_DTYPE_INT;
}
impl Element for i64 {
    const CODE: u8 = IDXC_DTYPE_INT;
}
impl Element for f32 {
    const CODE: u8 = IDXC_DTYPE_FLOAT;
}
impl Element for u8 {
    const CODE: u8 = IDXC_DTYPE_UINT;
}
impl Element for half::bf16 {
    const CODE: u8 = IDXC_DTYPE_BFLOAT;
}

fn c_tensor<T: Element>(data: *const T, shape: &[i64]) -> idxc_tensor {
    idxc_tensor {
        data: data.cast_mut().cast(),
        device: idxc_device { device_type: IDXC_DEVICE_CPU, device_id: 0 },
        ndim: shape.len() as i32,
        dtype: idxc_dtype { code: T::CODE, bits: 8 * size_of::<T>() as u8, lanes: 1 },
        // Lives on: C keeps no track of temporaries.
        shape: shape.to_vec().leak().as_mut_ptr(),
        strides: null_mut(),
        byte_offset: 0,
    }
}

fn owned<T: Element>(values: Vec<T>, shape: &[usize]) -> Owned<T> {
    assert_eq!(values.len(), shape.iter().product::<usize>());
    let shape: Vec<i64> = shape.iter().map(|&n| n as i64).collect();
    let c = c_tensor(values.as_ptr(), &shape);
    Owned { values, c }
}

/// `score(row, token)` of one Full layer: whole numbers below 251, so exact in bfloat16, and different for each `seed`.
fn score(seed: usize, row: usize, token: usize) -> usize {
    (token * (37 + 2 * seed) + row * 11 + seed * 53) % 251
}

/// The top-k of those scores, by the book.
fn best(seed: usize, row: usize, end: usize) -> Vec<i32> {
    let mut order: Vec<usize> = (0..end).collect();
    order.sort_by_key(|&t| (std::cmp::Reverse(score(seed, row, t)), t));
    let mut top: Vec<i32> = order.into_iter().take(TOPK).map(|t| t as i32).collect();
    top.sort_unstable();
    top.resize(TOPK, NONE);
    top
}

struct Host {
    context: *mut idxc_context,
    plan: *mut idxc_plan,
    cache: *mut idxc_cache,
    workspace: Vec<u8>,
}

impl Drop for Host {
    fn drop(&mut self) {
        unsafe {
            idxc_cache_destroy(self.cache);
            idxc_plan_destroy(self.plan);
            idxc_context_destroy(self.context);
        }
    }
}

fn context() -> *mut idxc_context {
    let mut out = null_mut();
    let d = desc::<idxc_context_desc>(|d| d.threads = 2);
    ok(unsafe { idxc_context_create(&raw const d, &raw mut out) });
    out
}

fn plan_of(pattern: &str, mtp_layers: i32, flags: u32) -> *mut idxc_plan {
    let mut out = null_mut();
    let model = desc::<idxc_model_desc>(|d| {
        (d.layers, d.topk, d.mtp_layers, d.flags) =
            (pattern.len() as i32, TOPK as i32, mtp_layers, flags);
    });
    let pattern = CString::new(pattern).unwrap();
    ok(unsafe { idxc_plan_from_pattern(&raw const model, pattern.as_ptr(), &raw mut out) });
    out
}

fn slice_of(plan: *const idxc_plan, first: i32, end: i32, flags: u32) -> *mut idxc_plan {
    let mut out = null_mut();
    ok(unsafe { idxc_plan_slice(plan, first, end, flags, &raw mut out) });
    out
}

fn info_of(plan: *const idxc_plan) -> idxc_plan_info {
    let mut info = desc::<idxc_plan_info>(|_| ());
    ok(unsafe { idxc_plan_get_info(plan, &raw mut info) });
    info
}

fn layer_of(plan: *const idxc_plan, layer: i32) -> idxc_layer_info {
    let mut info = desc::<idxc_layer_info>(|_| ());
    ok(unsafe { idxc_plan_layer_get_info(plan, layer, &raw mut info) });
    info
}

fn config(json: &str) -> Result<*mut idxc_plan, idxc_status> {
    let mut out = null_mut();
    match unsafe {
        idxc_plan_from_hf_config(json.as_ptr().cast::<c_char>(), json.len(), &raw mut out)
    } {
        IDXC_OK => Ok(out),
        status => Err(status),
    }
}

impl Host {
    /// Takes the plan.
    fn with(plan: *mut idxc_plan, lanes: i32) -> Self {
        let context = context();
        let d = desc::<idxc_cache_desc>(|d| (d.lanes, d.max_rows) = (lanes, ROWS as i32));
        let mut cache = null_mut();
        ok(unsafe { idxc_cache_create(context, plan, &raw const d, &raw mut cache) });
        Host { context, plan, cache, workspace: vec![0; 1 << 20] }
    }

    fn new(pattern: &str) -> Self {
        Self::with(plan_of(pattern, 0, 0), 2)
    }

    fn begin(&self, lane: i32, rows: usize, step: u64) {
        ok(unsafe { idxc_step_begin(self.cache, lane, rows as i32, step) });
    }

    /// Runs a layer's indexer over rows that see `ends[r]` tokens each, with the scores of `seed`.
    fn select(&mut self, lane: i32, layer: i32, seed: usize, ends: &[usize]) -> idxc_status {
        let rows = ends.len();
        let number = |n: usize| half::bf16::from_f32(n as f32);
        // Row r looks at dimension r of each key.
        let q = (0..rows * DIM).map(|i| number(usize::from(i % DIM == i / DIM))).collect();
        let k = (0..TOKENS * DIM).map(|i| number(score(seed, i % DIM, i / DIM))).collect();
        let (q, k) = (owned(q, &[rows, 1, DIM]), owned(k, &[TOKENS, DIM]));
        let weights = owned(vec![1f32; rows], &[rows, 1]);
        let end = owned(ends.iter().map(|&e| e as i32).collect(), &[rows]);
        let d = desc::<idxc_indexer_desc>(|d| {
            (d.q, d.weights, d.k, d.row_end) = (&q.c, &weights.c, &k.c, &end.c);
        });
        let workspace = self.workspace.as_mut_ptr().cast();
        unsafe {
            idxc_select(
                self.cache,
                lane,
                layer,
                &raw const d,
                workspace,
                self.workspace.len(),
                null_mut(),
            )
        }
    }

    fn publish(
        &self,
        lane: i32,
        layer: i32,
        rows: &[Vec<i32>],
        form: i32,
        table_id: u64,
    ) -> idxc_status {
        let t = owned(rows.concat(), &[rows.len(), TOPK]);
        unsafe { idxc_publish(self.cache, lane, layer, &t.c, form, table_id, null_mut()) }
    }

    fn carry(&self, lane: i32, from: &[i32], step: u64) -> idxc_status {
        let t = owned(from.to_vec(), &[from.len()]);
        unsafe { idxc_step_carry(self.cache, lane, &t.c, step, null_mut()) }
    }

    fn indices_status(&self, lane: i32, layer: i32) -> idxc_status {
        let mut out = unsafe { std::mem::zeroed::<idxc_tensor>() };
        unsafe { idxc_indices(self.cache, lane, layer, &raw mut out) }
    }

    fn tensor(&self, lane: i32, layer: i32) -> idxc_tensor {
        let mut out = unsafe { std::mem::zeroed::<idxc_tensor>() };
        ok(unsafe { idxc_indices(self.cache, lane, layer, &raw mut out) });
        out
    }

    #[track_caller]
    fn indices(&self, lane: i32, layer: i32) -> Vec<Vec<i32>> {
        let rows = unsafe { *self.tensor(lane, layer).shape } as usize;
        let out = owned(vec![77i32; rows * TOPK], &[rows, TOPK]);
        ok(unsafe { idxc_export(self.cache, lane, layer, &out.c, null_mut()) });
        // Read through the pointer: the library wrote behind the Vec.
        let values = unsafe { std::slice::from_raw_parts(out.c.data.cast::<i32>(), rows * TOPK) };
        values.chunks(TOPK).map(<[i32]>::to_vec).collect()
    }

    /// Attends with one head of two dimensions over `[TOKENS, 2]` KV whose row `t` is `(t, 1)`: with queries of zero the
    /// first value is the mean of the selected positions.
    fn attend(
        &mut self,
        lane: i32,
        layer: i32,
        rows: usize,
        table_id: u64,
    ) -> Result<Vec<f32>, idxc_status> {
        let q = owned(vec![0f32; rows * 2], &[rows, 1, 2]);
        let kv = owned(
            (0..TOKENS * 2).map(|i| if i % 2 == 0 { (i / 2) as f32 } else { 1.0 }).collect(),
            &[TOKENS, 2],
        );
        let mut out = vec![f32::NAN; rows];
        let shape = [rows as i64, 1, 1];
        let t_out = c_tensor(out.as_mut_ptr().cast_const(), &shape);
        let d = desc::<idxc_attention_desc>(|d| {
            (d.q, d.kv, d.out, d.softmax_scale, d.table_id) =
                (&q.c, &kv.c, &raw const t_out, 1.0, table_id);
        });
        let workspace = self.workspace.as_mut_ptr().cast();
        let status = unsafe {
            idxc_attend(
                self.cache,
                lane,
                layer,
                &raw const d,
                workspace,
                self.workspace.len(),
                null_mut(),
            )
        };
        if status == IDXC_OK { Ok(out) } else { Err(status) }
    }
}

fn mean(row: &[i32]) -> f32 {
    row.iter().sum::<i32>() as f32 / row.len() as f32
}

fn all_best(seed: usize, ends: &[usize]) -> Vec<Vec<i32>> {
    ends.iter().enumerate().map(|(row, &end)| best(seed, row, end)).collect()
}

const LONG: [usize; ROWS] = [TOKENS, 150, 120, 100, 90, 80];

/// Bug 1: A pipeline stage that starts on a Shared layer lost the indices: it must ask for them, its predecessor must know
/// to send them, and received ones must serve. Or the layer is promoted, and says so.
#[test]
fn bug_01_stage_starts_on_shared() {
    let whole = plan_of("FSFSSFSS", 0, 0);
    let (first, second) = (slice_of(whole, 0, 4, 0), slice_of(whole, 4, 8, 0));
    assert_eq!((info_of(first).receives_from_layer, info_of(first).sends_from_layer), (-1, 2));
    assert_eq!((info_of(second).receives_from_layer, info_of(second).sends_from_layer), (2, -1));
    assert_eq!(info_of(first).model_fingerprint, info_of(second).model_fingerprint);
    let promoted = slice_of(whole, 4, 8, IDXC_FLAG_PROMOTE);
    let info = info_of(promoted);
    assert_eq!((info.promoted_layer, info.receives_from_layer), (4, -1));
    assert_eq!(unsafe { idxc_plan_layer_role(promoted, 4) }, IDXC_ROLE_FULL);
    assert_eq!(layer_of(promoted, 4).index_k_slot, 0);

    let (mut sender, mut receiver) = (Host::with(first, 1), Host::with(second, 1));
    sender.begin(0, ROWS, 1);
    for layer in 0..4 {
        ok(sender.select(0, layer, layer as usize, &LONG));
    }
    receiver.begin(0, ROWS, 1);
    fails(receiver.select(0, 4, 0, &LONG), IDXC_ERR_STALE, "layer 4 uses the indices of layer 2");
    assert_eq!(receiver.attend(0, 4, ROWS, 0), Err(IDXC_ERR_STALE));
    ok(receiver.publish(0, 2, &sender.indices(0, 3), IDXC_FORM_LOGICAL, 0));
    ok(receiver.select(0, 4, 0, &LONG));
    assert_eq!(receiver.indices(0, 4), all_best(2, &LONG));
    ok(receiver.select(0, 5, 5, &LONG));
    assert_eq!(receiver.indices(0, 7), all_best(5, &LONG));
    unsafe { (idxc_plan_destroy(promoted), idxc_plan_destroy(whole)) };
}

/// Bug 2: A Shared layer read a buffer that nobody had written in this step.
#[test]
fn bug_02_shared_reads_unwritten_buffer() {
    let mut host = Host::new("FSFS");
    assert_eq!(host.indices_status(0, 1), IDXC_ERR_STALE); // no step yet
    host.begin(0, ROWS, 1);
    fails(host.select(0, 1, 0, &LONG), IDXC_ERR_STALE, "layer 1 uses the indices of layer 0");
    assert_eq!(host.indices_status(0, 1), IDXC_ERR_STALE);
    assert_eq!(host.attend(0, 1, ROWS, 0), Err(IDXC_ERR_STALE));
    ok(host.select(0, 0, 0, &LONG));
    assert_eq!(host.indices(0, 1), all_best(0, &LONG));
    // Layer 0's are there, but they are not layer 3's.
    fails(host.select(0, 3, 0, &LONG), IDXC_ERR_STALE, "layer 3 uses the indices of layer 2");
    assert_eq!(host.attend(0, 3, ROWS, 0), Err(IDXC_ERR_STALE));
    // A layer that was passed over does not get them later either.
    ok(host.select(0, 2, 2, &LONG));
    assert_eq!(host.indices_status(0, 1), IDXC_ERR_STALE);
    assert_eq!(host.attend(0, 1, ROWS, 0), Err(IDXC_ERR_STALE));
}

/// Bug 3: The draft (MTP) layer reused the target's indices, or started in skip mode.
#[test]
fn bug_03_draft_reuses_target_indices() {
    for flags in [0, IDXC_FLAG_MTP_SHARES] {
        let mut host = Host::with(plan_of("FSS", 1, flags), 2);
        assert_eq!(unsafe { idxc_plan_layer_role(host.plan, 3) }, IDXC_ROLE_FULL);
        assert_eq!(layer_of(host.plan, 3).source_layer, 3);
        host.begin(0, ROWS, 1);
        ok(host.select(0, 0, 0, &LONG));
        // Neither in the same step, nor carried into the draft's.
        assert_eq!(host.indices_status(0, 3), IDXC_ERR_STALE);
        assert_eq!(host.attend(0, 3, ROWS, 0), Err(IDXC_ERR_STALE));
        fails(host.carry(0, &[0, 1], 2), IDXC_ERR_INVALID, "MTP");
        // The draft's first step selects for itself.
        ok(host.select(0, 3, 9, &LONG));
        assert_eq!(host.indices(0, 3), all_best(9, &LONG));
        // Carried steps are for plans that share only.
        let status = host.carry(0, &[0, 1], 2);
        assert_eq!(status, if flags == 0 { IDXC_ERR_INVALID } else { IDXC_OK });
    }
}

/// Bug 4: The draft kept the indices of the last padded row instead of the last accepted one.
#[test]
fn bug_04_draft_keeps_padded_row() {
    let mut host = Host::with(plan_of("F", 1, IDXC_FLAG_MTP_SHARES), 1);
    // Two requests of three draft rows each: accepted are rows 0, 1 of the first and row 3 of the second.
    host.begin(0, ROWS, 1);
    ok(host.select(0, 1, 4, &LONG));
    let before = host.indices(0, 1);
    ok(host.carry(0, &[1, 3, NONE], 2));
    assert_eq!(host.indices(0, 1), [before[1].clone(), before[3].clone(), vec![NONE; TOPK]]);
    // Selecting again changes nothing in a carried step: the point of sharing.
    ok(host.select(0, 1, 5, &[100, 100, 0]));
    assert_eq!(host.indices(0, 1)[0], before[1]);
    // What could scramble rows is refused, and what is refused loses nothing.
    for from in [&[1, 0][..], &[0, 0], &[0, 3], &[NONE, 0], &[-2, 0]] {
        fails(host.carry(0, from, 3), IDXC_ERR_INVALID, "from");
    }
    assert_eq!(host.indices(0, 1)[1], before[3]);
}

/// Bug 5: Indices leaked from one step into the next, or between micro-batches.
#[test]
fn bug_05_indices_leak() {
    let mut host = Host::new("FS");
    host.begin(0, ROWS, 1);
    ok(host.select(0, 0, 0, &LONG));
    host.begin(1, 2, 1);
    assert_eq!(host.indices_status(1, 1), IDXC_ERR_STALE); // lane 0's are not lane 1's
    ok(host.select(1, 0, 3, &[140, 130]));
    assert_eq!(host.indices(0, 1), all_best(0, &LONG));
    assert_eq!(host.indices(1, 1), all_best(3, &[140, 130]));
    host.begin(0, ROWS, 2);
    fails(host.select(0, 1, 0, &LONG), IDXC_ERR_STALE, "step 2");
    assert_eq!(host.attend(0, 1, ROWS, 0), Err(IDXC_ERR_STALE));
    assert_eq!(host.indices(1, 1), all_best(3, &[140, 130]));
    // The same step twice is a host that forgot to count.
    assert_eq!(unsafe { idxc_step_begin(host.cache, 0, 1, 2) }, IDXC_ERR_INVALID);
}

/// Memory whose first element lies right behind a page that must not be touched: element -1 is a crash.
fn guarded<T: Element>(values: &[T]) -> *mut T {
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as usize;
    let bytes = size_of_val(values).next_multiple_of(page).max(page);
    unsafe {
        let base = libc::mmap(
            null_mut(),
            page + bytes,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        );
        assert_ne!(base, libc::MAP_FAILED);
        assert_eq!(libc::mprotect(base, page, libc::PROT_NONE), 0);
        let data = base.cast::<u8>().add(page).cast::<T>();
        data.copy_from_nonoverlapping(values.as_ptr(), values.len());
        data
    }
}

/// Bug 6: An index of -1 reached an address: row -1 of KV, page -1, request -1, slot -1.
#[test]
fn bug_06_minus_one_reaches_an_address() {
    const PAGES: usize = 4;
    const D: usize = 1024; // A row of KV is a page of memory: row -1 is the guard, whole.
    let context = context();
    let mut workspace = vec![0u8; 1 << 20];
    let (rows, heads) = (3usize, 2usize);
    let kv_values = vec![1f32; PAGES * 64 * D];
    let kv = guarded(&kv_values);
    let table_values = [2, 0, -1, 3, -1, -1]; // request 0 has two pages, request 1 one
    let table = c_tensor(guarded(&table_values), &[2, 3]);
    let request = c_tensor(guarded(&[0, 1, -1]), &[3]);
    let none_first = {
        let mut v = vec![NONE; rows * TOPK];
        (v[3], v[TOPK + 7]) = (70, 5); // -1 in front of and between what counts; row 2 has nothing
        v
    };
    let indices = c_tensor(guarded(&none_first), &[3, TOPK as i64]);
    let q = owned(vec![0.5f32; rows * heads * D], &[rows, heads, D]);
    let (mut out, mut lse) = (vec![f32::NAN; rows * heads * D], vec![f32::NAN; rows * heads]);
    let (out_shape, lse_shape) = ([3, 2, D as i64], [3, 2]);
    let t_out = c_tensor(out.as_mut_ptr().cast_const(), &out_shape);
    let t_lse = c_tensor(lse.as_mut_ptr().cast_const(), &lse_shape);
    let mut attend = |kv_shape: &[i64], paged: bool, indices: &idxc_tensor, form: i32| {
        let t_kv = c_tensor(kv.cast_const(), kv_shape);
        let d = desc::<idxc_attention_desc>(|d| {
            (d.q, d.kv, d.out, d.lse, d.softmax_scale) =
                (&q.c, &raw const t_kv, &t_out, &t_lse, 0.01);
            if paged {
                (d.block_table, d.row_request) = (&table, &request);
            }
        });
        let memory = workspace.as_mut_ptr().cast::<c_void>();
        ok(unsafe {
            idxc_sparse_attention(
                context,
                &raw const d,
                indices,
                form,
                memory,
                workspace.len(),
                null_mut(),
            )
        });
        let out = unsafe { std::slice::from_raw_parts(t_out.data.cast::<f32>(), rows * heads * D) };
        let lse = unsafe { std::slice::from_raw_parts(t_lse.data.cast::<f32>(), rows * heads) };
        assert!(
            out[..2 * heads * D].iter().all(|&v| (v - 1.0).abs() < 1e-6),
            "rows with one token"
        );
        assert!(out[2 * heads * D..].iter().all(|&v| v == 0.0), "a row without any");
        assert!(lse[2 * heads..].iter().all(|&v| v == f32::NEG_INFINITY));
    };
    let (flat, paged) = ([(PAGES * 64) as i64, D as i64], [PAGES as i64, 64, D as i64]);
    attend(&flat, false, &indices, IDXC_FORM_LOGICAL);
    attend(&flat, false, &indices, IDXC_FORM_SLOTS);
    attend(&paged, true, &indices, IDXC_FORM_LOGICAL);

    // -1 stays -1 on the way to slots; a padding row has no request.
    let slots = c_tensor(guarded(&vec![7i32; rows * TOPK]), &[3, TOPK as i64]);
    let d = desc::<idxc_indices_to_slots_desc>(|d| {
        (d.indices, d.block_table, d.row_request) = (&indices, &table, &request);
        (d.slots, d.page_size) = (&slots, 64);
    });
    ok(unsafe { idxc_indices_to_slots(context, &raw const d, null_mut()) });
    let written = unsafe { std::slice::from_raw_parts(slots.data.cast::<i32>(), rows * TOPK) };
    let want: Vec<i32> = none_first
        .iter()
        .map(|&i| {
            if i < 0 {
                -1
            } else if i == 70 {
                6
            } else {
                3 * 64 + 5
            }
        })
        .collect();
    assert_eq!(written, want);

    // Tokens without a slot are not written.
    let t_slots = owned(vec![-1i64, 1], &[2]);
    let new = owned(vec![9f32; 2 * D], &[2, D]);
    let t_kv = c_tensor(kv.cast_const(), &paged);
    let d = desc::<idxc_kv_write_desc>(|d| (d.kv, d.slots, d.pages) = (&new.c, &t_slots.c, &t_kv));
    ok(unsafe { idxc_kv_write(context, &raw const d, null_mut()) });
    assert_eq!(unsafe { (*kv, *kv.add(D)) }, (1.0, 9.0));
    let page_bytes = 64 * (DIM + 4);
    let k_pages = guarded(&vec![5u8; PAGES * page_bytes]);
    let t_pages = c_tensor(k_pages.cast_const(), &[PAGES as i64, page_bytes as i64]);
    let new = owned(vec![1f32; 2 * DIM], &[2, DIM]);
    let d = desc::<idxc_index_k_write_desc>(|d| {
        (d.k, d.slots, d.pages) = (&new.c, &t_slots.c, &t_pages)
    });
    ok(unsafe { idxc_index_k_write(context, &raw const d, null_mut()) });
    assert_eq!(unsafe { *k_pages }, 5);
    assert_ne!(unsafe { *k_pages.add(DIM) }, 5);

    // Paged scoring: pages that a request does not have, and a row without request.
    let q8 = c_tensor(guarded(&vec![56u8; rows * DIM]), &[3, 1, DIM as i64]);
    let q8 = idxc_tensor {
        dtype: idxc_dtype { code: IDXC_DTYPE_FLOAT8_E4M3FN, bits: 8, lanes: 1 },
        ..q8
    };
    let weights = owned(vec![1f32; rows], &[rows, 1]);
    let ends = owned(vec![100, 50, 0], &[rows]);
    let logits = owned(vec![0f32; rows * 192], &[rows, 192]);
    let d = desc::<idxc_indexer_desc>(|d| {
        (d.q, d.weights, d.k, d.block_table) = (&q8, &weights.c, &t_pages, &table);
        (d.row_request, d.row_end) = (&request, &ends.c);
    });
    ok(unsafe { idxc_paged_indexer_logits(context, &raw const d, &logits.c, null_mut()) });
    unsafe { idxc_context_destroy(context) };
    drop((logits.values, ends.values));
}

/// Bug 7: Buffers allocated by each call go stale under graph replay, a branch for short rows was baked into the graph, and
/// padding rows carried garbage. Without a graph: addresses stay, lengths are data, padding is -1.
#[test]
fn bug_07_addresses_move_and_lengths_are_baked() {
    let mut host = Host::new("FS");
    host.begin(0, ROWS, 1);
    let short = [TOPK - 3, TOPK, 1, 0, 2, 3]; // all take everything, one is padding
    ok(host.select(0, 0, 1, &short));
    let address = host.tensor(0, 1).data;
    let everything: Vec<Vec<i32>> = short
        .iter()
        .map(|&n| (0..TOPK).map(|i| if i < n { i as i32 } else { NONE }).collect())
        .collect();
    assert_eq!(host.indices(0, 1), everything);
    // The same call with other lengths in the same place.
    host.begin(0, ROWS, 2);
    ok(host.select(0, 0, 1, &LONG));
    assert_eq!(host.indices(0, 1), all_best(1, &LONG));
    host.begin(0, 2, 3);
    ok(host.select(0, 0, 2, &[0, TOKENS]));
    assert_eq!(host.indices(0, 1), [vec![NONE; TOPK], best(2, 1, TOKENS)]);
    assert_eq!(host.tensor(0, 1).data, address);
    let other_lane = {
        host.begin(1, 1, 1);
        ok(host.select(1, 0, 0, &[TOKENS]));
        host.tensor(1, 0).data
    };
    assert_ne!(other_lane, address);
    let attended = host.attend(0, 1, 2, 0).unwrap();
    assert_eq!(attended[0], 0.0);
}

/// Bug 8: Configured but inactive: a field in the wrong place of a nested config, or behind a switch that is off, did
/// nothing and nobody noticed. It is refused, or visible.
#[test]
fn bug_08_configured_but_inactive() {
    let glm = |extra: &str| {
        format!(
            r#"{{"model_type": "glm_moe_dsa", "num_hidden_layers": 8, "num_attention_heads": 64, "kv_lora_rank": 512,
                "qk_rope_head_dim": 64, "index_topk": 2048, "index_n_heads": 32, "index_head_dim": 128{extra}}}"#
        )
    };
    let active = config(&glm(r#", "index_topk_freq": 4"#)).unwrap();
    assert_eq!(info_of(active).field, IDXC_FIELD_TOPK_FREQ);
    assert!(info_of(active).shared_layers > 0);
    // Switched off: every layer is Full, and the plan says why.
    let off = config(&glm(r#", "index_topk_freq": 4, "use_index_cache": false"#)).unwrap();
    let info = info_of(off);
    assert_eq!((info.field, info.shared_layers, info.full_layers), (IDXC_FIELD_DEFAULT, 0, 8));
    assert!(info.notes > 0);
    let mut json = vec![0u8; 1 << 16];
    let mut size = 0;
    ok(unsafe {
        idxc_plan_export(
            off,
            IDXC_EXPORT_JSON,
            0,
            json.as_mut_ptr().cast(),
            json.len(),
            &raw mut size,
        )
    });
    let json = CStr::from_bytes_until_nul(&json).unwrap().to_str().unwrap();
    assert!(json.contains("use_index_cache is false"), "{json}");
    // Flat, where the model's fields are nested: refused, with where it belongs.
    let nested = r#"{"model_type": "minimax_m3_vl", "index_topk_freq": 4, "text_config": {"num_hidden_layers": 4,
        "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128, "sparse_attention_config": {
        "use_sparse_attention": true, "sparse_num_index_heads": 4, "sparse_index_dim": 128, "sparse_block_size": 128,
        "sparse_topk_blocks": 16, "sparse_init_block": 0, "sparse_local_block": 1, "sparse_score_type": "max",
        "sparse_attention_freq": [1, 1, 1, 1]}}}"#;
    assert_eq!(config(nested).unwrap_err(), IDXC_ERR_CONFIG);
    assert!(text().contains("text_config"), "{}", text());
    unsafe { (idxc_plan_destroy(active), idxc_plan_destroy(off)) };
}

/// Bug 9: Shared layers allocated, or wrote, index K that nobody reads.
#[test]
fn bug_09_shared_layers_own_index_k() {
    let plan = plan_of("FSSSFSSSF", 1, 0);
    let info = info_of(plan);
    assert_eq!(info.index_k_slots, 4); // three Full layers and the draft's
    let slots: Vec<i32> = (0..10).map(|l| layer_of(plan, l).index_k_slot).collect();
    assert_eq!(slots, [0, -1, -1, -1, 1, -1, -1, -1, 2, 3]);
    assert_eq!(info.index_k_bytes_per_token, 4.0 * 132.0);
    assert_eq!(info.index_k_bytes_saved_per_token, 6.0 * 132.0);
    unsafe { idxc_plan_destroy(plan) };
}

/// Bug 10: Shared layers of checkpoints without indexer weights ran a randomly initialised indexer, which shows only past
/// top-k. On a Shared layer nothing that the host passes is looked at.
#[test]
fn bug_10_shared_layers_run_an_indexer() {
    let mut host = Host::new("FSS");
    host.begin(0, ROWS, 1);
    ok(host.select(0, 0, 0, &LONG));
    ok(host.select(0, 1, 9, &LONG)); // other scores
    assert_eq!(host.indices(0, 1), all_best(0, &LONG));
    assert_ne!(all_best(0, &LONG), all_best(9, &LONG));
    ok(unsafe { idxc_select(host.cache, 0, 2, null(), null_mut(), 0, null_mut()) });
    let garbage = desc::<idxc_indexer_desc>(|d| d.q = std::ptr::dangling());
    ok(unsafe { idxc_select(host.cache, 0, 2, &raw const garbage, null_mut(), 0, null_mut()) });
    let attended = host.attend(0, 2, ROWS, 0).unwrap();
    for (row, &end) in LONG.iter().enumerate() {
        assert!((attended[row] - mean(&best(0, row, end))).abs() < 1e-3);
    }
}

/// Bug 11: A capability that the backend lacks showed up as a crash or as wrong numbers, deep in the first request.
#[test]
fn bug_11_missing_capability_shows_late() {
    let d = desc::<idxc_context_desc>(|d| (d.backend, d.device_id) = (IDXC_BACKEND_CUDA, 99));
    let mut out = null_mut();
    let status = unsafe { idxc_context_create(&raw const d, &raw mut out) };
    assert!([IDXC_ERR_NO_KERNEL_IMAGE, IDXC_ERR_NO_DEVICE].contains(&status), "{status}");
    assert!(out.is_null() && text().contains("99"), "{}", text());

    // A model that selects blocks: told when the cache is made, refused where it matters, and the host's kernels serve.
    static WARNINGS: AtomicUsize = AtomicUsize::new(0);
    unsafe extern "C" fn on_log(level: i32, message: *const c_char, _: *mut c_void) {
        let message = unsafe { CStr::from_ptr(message) }.to_string_lossy();
        if level == IDXC_LOG_WARNING
            && message.contains("layer 3 selects 4 set(s) of blocks of 128")
        {
            WARNINGS.fetch_add(1, Ordering::Relaxed);
        }
    }
    let json = std::fs::read_to_string(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/data/configs/minimax_m3.json"
    ));
    let plan = config(&json.unwrap()).unwrap();
    ok(unsafe { idxc_set_log_callback(Some(on_log), null_mut()) });
    let mut host = Host::with(plan, 1);
    ok(unsafe { idxc_set_log_callback(None, null_mut()) });
    assert_eq!(WARNINGS.load(Ordering::Relaxed), 1);
    host.begin(0, 1, 1);
    fails(host.select(0, 3, 0, &[TOKENS]), IDXC_ERR_UNSUPPORTED, "idxc_publish");
    let width = info_of(host.plan).topk as usize;
    let blocks = owned((0..width as i32).collect(), &[1, width]);
    ok(unsafe { idxc_publish(host.cache, 0, 3, &blocks.c, IDXC_FORM_LOGICAL, 0, null_mut()) });
    assert_eq!(host.indices_status(0, 3), IDXC_OK);
    assert_eq!(host.attend(0, 3, 1, 0), Err(IDXC_ERR_UNSUPPORTED));
}

/// Bug 12: Metadata of a draft step was overwritten by the next, or by the target: lengths and tables are read during the
/// call, and each lane keeps its own rows, step and source.
#[test]
fn bug_12_metadata_overwritten_across_draft_steps() {
    let mut host = Host::with(plan_of("FS", 1, IDXC_FLAG_MTP_SHARES), 2);
    let lane_info = |lane: i32| {
        let mut info = desc::<idxc_lane_info>(|_| ());
        ok(unsafe { idxc_lane_get_info(host.cache, lane, &raw mut info) });
        (info.step_id, info.rows, info.source_layer)
    };
    let cache = host.cache;
    ok(unsafe { idxc_step_begin(cache, 0, ROWS as i32, 1) });
    assert_eq!(lane_info(0), (1, ROWS as i32, -1));
    // `select` lets go of all that it was given: the arrays are freed before anything else happens.
    ok(host.select(0, 0, 0, &LONG));
    host.begin(1, 4, 100);
    ok(host.select(1, 2, 7, &[120, 110, 100, 90]));
    for (step, from) in [(101, &[1, 3][..]), (102, &[0, 1]), (103, &[1])] {
        let before = host.indices(1, 2);
        ok(host.carry(1, from, step));
        let want: Vec<_> = from.iter().map(|&r| before[r as usize].clone()).collect();
        assert_eq!(host.indices(1, 2), want);
        assert_eq!(host.indices(0, 1), all_best(0, &LONG));
    }
    let mut info = desc::<idxc_lane_info>(|_| ());
    ok(unsafe { idxc_lane_get_info(host.cache, 0, &raw mut info) });
    assert_eq!((info.step_id, info.rows, info.source_layer), (1, ROWS as i32, 0));
    ok(unsafe { idxc_lane_get_info(host.cache, 1, &raw mut info) });
    assert_eq!((info.step_id, info.rows, info.source_layer), (103, 1, 2));
    assert_eq!(host.indices(1, 2), [best(7, 3, 90)]);
}

/// Bug 13: Indices that were translated to slots were used under another block table.
#[test]
fn bug_13_slots_under_another_block_table() {
    let mut host = Host::new("FS");
    host.begin(0, 2, 1);
    let slots = vec![vec![64, 65, 66, 67, 128, 129, 130, 131], vec![0, 1, 2, 3, 4, 5, NONE, NONE]];
    ok(host.publish(0, 0, &slots, IDXC_FORM_SLOTS, 41));
    for other in [0, 40, 42] {
        assert_eq!(host.attend(0, 1, 2, other), Err(IDXC_ERR_FORM));
        assert!(text().contains("41"), "{}", text());
    }
    assert_eq!(host.attend(0, 1, 2, 41).unwrap(), [mean(&slots[0]), 2.5]);
    // Logical indices have no table to be wrong about, and slots do not turn into them by the next step.
    fails(host.publish(0, 0, &slots, IDXC_FORM_LOGICAL, 41), IDXC_ERR_INVALID, "table_id");
    host.begin(0, 2, 2);
    assert_eq!(host.attend(0, 1, 2, 41), Err(IDXC_ERR_STALE));
    ok(host.publish(0, 0, &slots, IDXC_FORM_LOGICAL, 0));
    assert!(host.attend(0, 1, 2, 42).is_ok());
}
