//! Size queries look at shapes only: tensors without memory are fine, and what they answer is what the calls need.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use indexcache::capi::cache::*;
use indexcache::capi::context::*;
use indexcache::capi::ops::*;
use indexcache::capi::plan::*;
use indexcache::capi::types::*;
use indexcache::capi::*;
use std::ptr::{null, null_mut};

struct Dense {
    shape: Vec<i64>,
    tensor: idxc_tensor,
}

fn dense(shape: &[i64], code: u8, bits: u8) -> Box<Dense> {
    let mut d = Box::new(Dense {
        shape: shape.to_vec(),
        tensor: idxc_tensor {
            data: null_mut(),
            device: idxc_device { device_type: IDXC_DEVICE_CPU, device_id: 0 },
            ndim: shape.len() as i32,
            dtype: idxc_dtype { code, bits, lanes: 1 },
            shape: null_mut(),
            strides: null_mut(),
            byte_offset: 0,
        },
    });
    d.tensor.shape = d.shape.as_mut_ptr();
    d
}

fn f32s(shape: &[i64]) -> Box<Dense> {
    dense(shape, IDXC_DTYPE_FLOAT, 32)
}
fn i32s(shape: &[i64]) -> Box<Dense> {
    dense(shape, IDXC_DTYPE_INT, 32)
}

fn text() -> String {
    // SAFETY: the library's string, valid until the next failing call.
    unsafe { std::ffi::CStr::from_ptr(idxc_last_error()) }.to_str().unwrap().to_owned()
}

#[test]
fn shapes_are_enough() {
    let model = idxc_model_desc {
        struct_size: 24,
        flags: 0,
        layers: 2,
        topk: 64,
        mtp_layers: 0,
        index_head_dim: 0,
    };
    let size =
        idxc_cache_desc { struct_size: 24, flags: 0, lanes: 0, max_rows: 32, buffer: null() };
    let (mut context, mut plan, mut cache) = (null_mut(), null_mut(), null_mut());
    let [q, w, k] = [dense(&[32, 8, 128], 10, 8), f32s(&[32, 8]), dense(&[9, 64 * 132], 1, 8)];
    let [table, end] = [i32s(&[4, 3]), i32s(&[32])];
    let [aq, kv, out] = [f32s(&[32, 4, 576]), dense(&[9, 64, 1, 656], 1, 8), f32s(&[32, 4, 512])];
    let (indices, logits) = (i32s(&[32, 64]), f32s(&[32, 1000]));
    let indexer = idxc_indexer_desc {
        struct_size: 72,
        flags: 0,
        q: &q.tensor,
        weights: &w.tensor,
        k: &k.tensor,
        k_scale: null(),
        block_table: &table.tensor,
        row_request: null(),
        row_start: null(),
        row_end: &end.tensor,
    };
    let mut attention = idxc_attention_desc {
        struct_size: 104,
        flags: 0,
        q: &aq.tensor,
        kv: &kv.tensor,
        block_table: &table.tensor,
        row_request: null(),
        row_start: null(),
        row_topk: null(),
        sink: null(),
        out: &out.tensor,
        lse: null(),
        table_id: 0,
        softmax_scale: 1.0,
        reserved: 0,
        probs: null(),
    };
    let topk = idxc_topk_desc {
        struct_size: 40,
        flags: 0,
        logits: &logits.tensor,
        row_start: null(),
        row_end: null(),
        indices: &indices.tensor,
    };
    let [tq, tk, tw] = [f32s(&[32, 8, 128]), f32s(&[1000, 128]), f32s(&[32, 8])];
    let (target, loss) = (f32s(&[32, 1000]), f32s(&[1]));
    let distill = idxc_distill_desc {
        struct_size: 128,
        flags: 0,
        q: &tq.tensor,
        k: &tk.tensor,
        weights: &tw.tensor,
        row_start: null(),
        row_end: null(),
        indices: null(),
        target: &target.tensor,
        attention_q: null(),
        kv: null(),
        lse: null(),
        loss: &loss.tensor,
        grad_q: &tq.tensor,
        grad_k: &tk.tensor,
        grad_weights: &tw.tensor,
        softmax_scale: 0.0,
        layer_weight: 1.0,
    };
    let mut bytes = [usize::MAX; 6];
    // SAFETY: everything lives until the end of the block.
    unsafe {
        assert_eq!(idxc_context_create(null(), &mut context), IDXC_OK, "{}", text());
        assert_eq!(
            idxc_plan_from_pattern(&model, c"FS".as_ptr(), &mut plan),
            IDXC_OK,
            "{}",
            text()
        );
        assert_eq!(idxc_cache_create(context, plan, &size, &mut cache), IDXC_OK, "{}", text());
        assert_eq!(idxc_select_workspace(cache, &indexer, &mut bytes[0]), IDXC_OK, "{}", text());
        assert_eq!(idxc_attend_workspace(cache, &attention, &mut bytes[1]), IDXC_OK, "{}", text());
        let stateless =
            idxc_sparse_attention_workspace(context, &attention, &indices.tensor, 0, &mut bytes[2]);
        assert_eq!(stateless, IDXC_OK, "{}", text());
        assert_eq!(bytes[1], bytes[2]);
        attention.block_table = null(); // Slots of a paged store.
        assert_eq!(idxc_attend_workspace(cache, &attention, &mut bytes[3]), IDXC_OK, "{}", text());
        assert_eq!(bytes[1], bytes[3]);
        assert_eq!(idxc_topk_workspace(context, &topk, &mut bytes[4]), IDXC_OK, "{}", text());
        assert_eq!(idxc_distill_workspace(context, &distill, &mut bytes[5]), IDXC_OK, "{}", text());
        assert!(bytes.iter().all(|&b| b != usize::MAX), "{bytes:?}");

        // A call, unlike a query, needs the memory.
        assert_eq!(idxc_step_begin(cache, 0, 32, 1), IDXC_OK);
        assert_eq!(idxc_select(cache, 0, 0, &indexer, null_mut(), 0, null_mut()), IDXC_ERR_INVALID);
        assert!(text().contains("idxc_select: q: expected a data pointer, got NULL"), "{}", text());
        idxc_cache_destroy(cache);
        idxc_plan_destroy(plan);
        idxc_context_destroy(context);
    }
}
