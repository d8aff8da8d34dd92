//! `kernels/params.h` in Rust: the structs that kernels take by value.

use crate::ops;
use crate::tensor::View;

/// Declares a struct as C lays it out, its size, and its field names for the comparison with `params.h`.
macro_rules! params {
    ($(struct $name:ident = $size:literal { $($field:ident: $ty:ty),* $(,)? })*) => {
        $(
            #[repr(C)]
            #[derive(Clone, Copy, Debug)]
            pub(super) struct $name { $(pub $field: $ty),* }
            const _: () = assert!(size_of::<$name>() == $size);
        )*
        #[cfg(test)]
        const DECLARED: &[(&str, usize, &[(&str, &str)])] =
            &[$((stringify!($name), $size, &[$((stringify!($field), stringify!($ty))),*])),*];
    };
}

/// An address on the device; 0 is none.
pub(super) type Ptr = u64;

params! {
    struct KeyMap = 88 {
        block_table: Ptr,
        row_request: Ptr,
        row_start: Ptr,
        row_end: Ptr,
        table_stride: i64,
        rows_per_request: i64,
        requests: i64,
        max_pages: i64,
        pages: i64,
        page: i64,
        keys: i64,
    }
    struct Indexer = 192 {
        q: Ptr,
        weights: Ptr,
        keys: Ptr,
        scales: Ptr,
        map: KeyMap,
        q_row: i64,
        q_head: i64,
        weights_row: i64,
        page_bytes: i64,
        row_bytes: i64,
        scale_page_bytes: i64,
        rows: i64,
        heads: i32,
        dim: i32,
        fp8: i32,
        reserved: i32,
    }
    struct Logits = 224 {
        ix: Indexer,
        out: Ptr,
        out_row: i64,
        columns: i64,
        out_type: i64,
    }
    struct TopK = 64 {
        logits: Ptr,
        row_start: Ptr,
        row_end: Ptr,
        out: Ptr,
        logits_row: i64,
        out_row: i64,
        columns: i64,
        k: i32,
        type_: i32,
    }
    struct Select = 248 {
        ix: Indexer,
        out: Ptr,
        ranks: Ptr,
        positions: Ptr,
        counts: Ptr,
        out_row: i64,
        ranges: i64,
        k: i32,
        capacity: i32,
    }
    struct Decode = 280 {
        ix: Indexer,
        scores: Ptr,
        tops: Ptr,
        out: Ptr,
        scores_row: i64,
        tops_row: i64,
        out_row: i64,
        columns: i64,
        first: i64,
        rows: i32,
        queries: i32,
        k: i32,
        stages: i32,
        eights: i32,
        reserved: i32,
    }
    struct IndexKWrite = 80 {
        k: Ptr,
        slots: Ptr,
        pages: Ptr,
        k_row: i64,
        page_bytes: i64,
        slot_limit: i64,
        tokens: i64,
        k_type: i32,
        wide_slots: i32,
        dim: i32,
        hadamard: i32,
        pow2_scale: i32,
        norm: f32,
    }
    struct IndexQQuantize = 120 {
        q: Ptr,
        weights: Ptr,
        q_out: Ptr,
        weights_out: Ptr,
        q_row: i64,
        q_head: i64,
        weights_row: i64,
        q_out_row: i64,
        q_out_head: i64,
        weights_out_row: i64,
        vectors: i64,
        heads: i32,
        dim: i32,
        q_type: i32,
        hadamard: i32,
        pow2_scale: i32,
        norm: f32,
        scale: f32,
        reserved: i32,
    }
    struct KvWrite = 88 {
        kv: Ptr,
        slots: Ptr,
        pages: Ptr,
        kv_row: i64,
        page_bytes: i64,
        row_bytes: i64,
        page: i64,
        slot_limit: i64,
        tokens: i64,
        kv_type: i32,
        wide_slots: i32,
        format: i32,
        d_qk: i32,
    }
    struct IndicesToSlots = 128 {
        indices: Ptr,
        slots: Ptr,
        map: KeyMap,
        indices_row: i64,
        slots_row: i64,
        k: i64,
    }
    struct CopyRows = 40 {
        from: Ptr,
        to: Ptr,
        from_row: i64,
        to_row: i64,
        k: i64,
    }
    struct CarryRows = 48 {
        data: Ptr,
        from: Ptr,
        row: i64,
        rows: i64,
        old_rows: i64,
        k: i64,
    }
    struct Overlap = 56 {
        own: Ptr,
        reused: Ptr,
        out: Ptr,
        own_row: i64,
        reused_row: i64,
        own_k: i64,
        reused_k: i64,
    }
    struct Attention = 256 {
        q: Ptr,
        kv: Ptr,
        indices: Ptr,
        row_topk: Ptr,
        sink: Ptr,
        out: Ptr,
        lse: Ptr,
        map: KeyMap,
        q_row: i64,
        q_head: i64,
        indices_row: i64,
        out_row: i64,
        out_head: i64,
        lse_row: i64,
        page_bytes: i64,
        row_bytes: i64,
        page: i64,
        softmax_scale: f32,
        heads: i32,
        d_qk: i32,
        d_v: i32,
        topk: i32,
        mapped: i32,
        q_type: i32,
        kv_format: i32,
        out_type: i32,
        reserved: i32,
    }
    struct AttentionProbs = 272 {
        a: Attention,
        probs: Ptr,
        probs_row: i64,
    }
    struct AttentionSm90 = 280 {
        a: Attention,
        part_out: Ptr,
        part_lse: Ptr,
        splits: i32,
        split_tiles: i32,
    }
    struct Planes = 32 {
        data: Ptr,
        plane: i64,
        row: i64,
        head: i64,
    }
    struct DistillPack = 104 {
        from: Ptr,
        to: Ptr,
        flags: Ptr,
        weights: Ptr,
        weights_to: Ptr,
        weights_row: i64,
        from_row: i64,
        from_head: i64,
        rows: i64,
        padded_rows: i64,
        heads: i32,
        padded_heads: i32,
        dim: i32,
        padded_dim: i32,
        type_: i32,
        planes: i32,
    }
    struct Distill = 528 {
        map: KeyMap,
        q: Planes,
        k: Planes,
        attention_q: Planes,
        kv: Planes,
        weights: Ptr,
        lse: Ptr,
        target: Ptr,
        indices: Ptr,
        loss: Ptr,
        grad_q: Ptr,
        grad_k: Ptr,
        grad_weights: Ptr,
        scores: Ptr,
        targets: Ptr,
        by_key: Ptr,
        partial: Ptr,
        q_flags: Ptr,
        k_flags: Ptr,
        row_loss: Ptr,
        live: Ptr,
        lse_row: i64,
        target_row: i64,
        indices_row: i64,
        grad_q_row: i64,
        grad_q_head: i64,
        grad_k_row: i64,
        grad_weights_row: i64,
        rows: i64,
        first: i64,
        count: i64,
        keys: i64,
        columns: i64,
        topk: i64,
        width: i64,
        first_key: i64,
        own_keys: i64,
        key_width: i64,
        parts: i64,
        score_pairs: i32,
        target_pairs: i32,
        heads: i32,
        padded_heads: i32,
        dim: i32,
        attention_heads: i32,
        attention_padded: i32,
        attention_dim: i32,
        softmax_scale: f32,
        layer_weight: f32,
    }
    struct IndexerSm90 = 328 {
        ix: Indexer,
        out: Ptr,
        out_row: i64,
        columns: i64,
        prefix: Ptr,
        sample_prefix: Ptr,
        size: Ptr,
        lead: Ptr,
        again: Ptr,
        samples: Ptr,
        thresholds: Ptr,
        lists: Ptr,
        counts: Ptr,
        lengths: Ptr,
        out_type: i32,
        k: i32,
        capacity: i32,
        retry: i32,
        block_rows: i32,
        splits: i32,
        ctas: i32,
        reserved: i32,
    }
}

/// A size or stride as the device wants it. All of them were checked to fit the address space.
pub(super) fn n(x: usize) -> i64 {
    i64::try_from(x).unwrap_or(i64::MAX)
}

/// A number that the operation's checks keep small.
pub(super) fn small(x: usize) -> i32 {
    i32::try_from(x).unwrap_or(i32::MAX)
}

/// Where a view's first element is.
pub(super) fn at<T>(p: *const T) -> Ptr {
    p.addr() as Ptr
}

/// One element a row, if given.
pub(super) fn per_row<T: crate::tensor::Element>(v: Option<View<'_, T, 1>>) -> Ptr {
    v.map_or(0, |v| at(v.as_ptr()))
}

impl KeyMap {
    /// Slots are looked up by themselves, below `keys`.
    pub(super) fn slots(keys: usize) -> Self {
        KeyMap {
            block_table: 0,
            row_request: 0,
            row_start: 0,
            row_end: 0,
            table_stride: 0,
            rows_per_request: 1,
            requests: 1,
            max_pages: 0,
            pages: 0,
            page: 1,
            keys: n(keys),
        }
    }

    pub(super) fn of(map: &ops::KeyMap<'_>) -> Self {
        let [requests, max_pages] = map.block_table.map_or([1, 0], |t| t.shape());
        let (pages, page) = match map.store {
            ops::Store::Paged { pages, page } => (pages, page),
            ops::Store::Contiguous(_) => (0, 1),
        };
        KeyMap {
            block_table: map.block_table.map_or(0, |t| at(t.as_ptr())),
            row_request: per_row(map.row_request),
            row_start: per_row(map.row_start),
            row_end: per_row(map.row_end),
            table_stride: map.block_table.map_or(0, |t| n(t.strides()[0])),
            rows_per_request: n(map.rows_per_request),
            requests: n(requests),
            max_pages: n(max_pages),
            pages: n(pages),
            page: n(page),
            keys: n(map.slots()),
        }
    }
}

impl Indexer {
    pub(super) fn of(ix: &ops::Indexer<'_>) -> Self {
        let (q, fp8, [q_row, q_head, _]) = match ix.q {
            ops::Query::F8(v) => (at(v.as_ptr()), 1, v.strides()),
            ops::Query::Bf16(v) => (at(v.as_ptr()), 0, v.strides()),
        };
        let (keys, scales, page_bytes, row_bytes, scale_page_bytes) = match ix.keys {
            ops::Keys::F8(v, s) => (at(v.as_ptr()), at(s.as_ptr()), 0, v.strides()[0], 0),
            ops::Keys::Bf16(v) => (at(v.as_ptr()), 0, 0, 2 * v.strides()[0], 0),
            ops::Keys::PagedF8(v) => {
                let (first, page) = (at(v.as_ptr()), v.strides()[0]);
                (first, first + (ops::PAGE * ix.dim) as Ptr, page, ix.dim, page)
            }
            ops::Keys::PagedBf16(v) => {
                (at(v.as_ptr()), 0, 2 * v.strides()[0], 2 * v.strides()[1], 0)
            }
        };
        Indexer {
            q,
            weights: at(ix.weights.as_ptr()),
            keys,
            scales,
            map: KeyMap::of(&ix.map),
            q_row: n(q_row),
            q_head: n(q_head),
            weights_row: n(ix.weights.strides()[0]),
            page_bytes: n(page_bytes),
            row_bytes: n(row_bytes),
            scale_page_bytes: n(scale_page_bytes),
            rows: n(ix.rows),
            heads: small(ix.heads),
            dim: small(ix.dim),
            fp8,
            reserved: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::DECLARED;

    fn c_type(rust: &str) -> &str {
        match rust {
            "i64" => "int64_t",
            "i32" => "int32_t",
            "f32" => "float",
            other => other,
        }
    }

    #[test]
    fn the_header_declares_the_same_structs() {
        let header = include_str!("../../../kernels/params.h");
        for (name, size, fields) in DECLARED {
            let body = header.split(&format!("\nstruct {name} {{")).nth(1).unwrap();
            let body = body.split("\n};").next().unwrap();
            let lines: Vec<&str> = body.lines().map(str::trim).filter(|l| !l.is_empty()).collect();
            assert_eq!(lines.len(), fields.len(), "{name}");
            for (line, (field, ty)) in lines.iter().zip(*fields) {
                let (c, declared) = line.trim_end_matches(';').rsplit_once(' ').unwrap();
                assert_eq!(declared, field.trim_end_matches('_'), "{name}");
                let pointer = *ty == "Ptr" && c.ends_with('*');
                assert!(pointer || c == c_type(ty), "{name}.{field}: {c} is not {ty}");
            }
            let asserted = format!("static_assert(sizeof({name}) == {size},");
            assert!(header.contains(&asserted), "{name}");
        }
        assert_eq!(header.matches("\nstruct ").count(), DECLARED.len());
    }
}
