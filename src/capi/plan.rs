//! `idxc_plan`: which layers select, which reuse.

use super::types::{Descriptor, descriptor, give_struct};
use super::{
    IDXC_LOG_WARNING, give, give_text, guard, handle, idxc_status, log, out_pointer, slice, take,
    text,
};
use crate::error::{Error, Result};
use crate::plan::{
    Dialect, ExportFormat, Field, IndexKFormat, Indexers, Model, Pattern, Plan, Role, Spelling,
};
use std::ffi::c_char;
use std::sync::Arc;

/// A resolved pattern with everything that follows from it. Immutable; may be used from any number of threads.
pub struct idxc_plan(pub(super) Arc<Plan>);

/// Role: no sparse attention.
pub const IDXC_ROLE_NONE: i32 = 0;
/// Role: runs its indexer and writes the indices.
pub const IDXC_ROLE_FULL: i32 = 1;
/// Role: uses the indices of the nearest Full layer before it.
pub const IDXC_ROLE_SHARED: i32 = 2;

/// Rule for `index_topk_freq`: `max(layer - offset + 1, 0) % freq != 0` is Shared, default offset 2 (Transformers, vLLM,
/// SGLang, TensorRT-LLM, lmdeploy).
pub const IDXC_DIALECT_HF: i32 = 0;
/// Rule for `index_topk_freq`: `max(layer - offset, 0) % freq`, default 1 (ATOM).
pub const IDXC_DIALECT_ATOM: i32 = 1;
/// Rule for `index_topk_freq`: `layer <= offset || (layer - offset) % freq == 0` is Full, default 0 (older xLLM).
pub const IDXC_DIALECT_XLLM: i32 = 2;
/// Rule for `index_topk_freq`: the first rule, layers counted from 1, no default (Megatron).
pub const IDXC_DIALECT_MEGATRON: i32 = 3;
/// Rule for `index_topk_freq`: `max(n - 1, 0) % freq`, `n` counts the layers with an indexer (vLLM for DeepSeek-V4).
pub const IDXC_DIALECT_V4: i32 = 4;
/// Rule for `index_topk_freq`: `n % freq`, `n` counts the layers with an indexer (ATOM for DeepSeek-V4).
pub const IDXC_DIALECT_V4_ATOM: i32 = 5;
/// Rule for `index_topk_freq`: `max(n - offset, 0) % freq`, default 0, `n` counts the sparse layers (MiniMax-M3).
pub const IDXC_DIALECT_M3: i32 = 6;

/// The field that decided: an argument of the call.
pub const IDXC_FIELD_ARGUMENT: i32 = 0;
/// The field that decided: `indexer_types`.
pub const IDXC_FIELD_INDEXER_TYPES: i32 = 1;
/// The field that decided: `index_topk_pattern`.
pub const IDXC_FIELD_TOPK_PATTERN: i32 = 2;
/// The field that decided: `index_source_layer_ids`.
pub const IDXC_FIELD_SOURCE_LAYER_IDS: i32 = 3;
/// The field that decided: `index_topk_freq`.
pub const IDXC_FIELD_TOPK_FREQ: i32 = 4;
/// No field asks for reuse, or what asks is switched off: every layer is Full.
pub const IDXC_FIELD_DEFAULT: i32 = 5;

/// Export: one letter a layer, for `index_topk_pattern`.
pub const IDXC_EXPORT_PATTERN: i32 = 0;
/// Export: JSON list for `indexer_types`.
pub const IDXC_EXPORT_INDEXER_TYPES: i32 = 1;
/// Export: JSON object with `index_topk_freq` and `index_skip_topk_offset`; `IDXC_ERR_CONFIG` if none mean this pattern.
pub const IDXC_EXPORT_FREQ: i32 = 2;
/// Export: JSON list for `index_source_layer_ids`.
pub const IDXC_EXPORT_SOURCE_LAYERS: i32 = 3;
/// Export: JSON object with everything the plan knows, the notes about ignored or overruled fields among it.
pub const IDXC_EXPORT_JSON: i32 = 4;
/// Export: one letter for each layer with an indexer, the short form of `index_topk_pattern`.
pub const IDXC_EXPORT_COMPACT_PATTERN: i32 = 5;

/// Flag of `idxc_plan_slice`: a stage that would start on a Shared layer runs it as Full instead of receiving indices.
pub const IDXC_FLAG_PROMOTE: u32 = 1;
/// Flag of `idxc_model_desc`: later draft steps reuse the draft layer's own indices (`index_share_for_mtp_iteration`).
pub const IDXC_FLAG_MTP_SHARES: u32 = 2;
/// Flag of `idxc_model_desc`: index K is bfloat16 instead of fp8.
pub const IDXC_FLAG_INDEX_K_BF16: u32 = 4;

const _: () = {
    assert!(IDXC_ROLE_NONE == Role::None as i32);
    assert!(IDXC_ROLE_FULL == Role::Full as i32);
    assert!(IDXC_ROLE_SHARED == Role::Shared as i32);
    assert!(IDXC_DIALECT_HF == Dialect::Hf as i32);
    assert!(IDXC_DIALECT_ATOM == Dialect::Atom as i32);
    assert!(IDXC_DIALECT_XLLM == Dialect::Xllm as i32);
    assert!(IDXC_DIALECT_MEGATRON == Dialect::Megatron as i32);
    assert!(IDXC_DIALECT_V4 == Dialect::V4 as i32);
    assert!(IDXC_DIALECT_V4_ATOM == Dialect::V4Atom as i32);
    assert!(IDXC_DIALECT_M3 == Dialect::M3 as i32);
    assert!(IDXC_FIELD_ARGUMENT == Field::Argument as i32);
    assert!(IDXC_FIELD_INDEXER_TYPES == Field::IndexerTypes as i32);
    assert!(IDXC_FIELD_TOPK_PATTERN == Field::TopkPattern as i32);
    assert!(IDXC_FIELD_SOURCE_LAYER_IDS == Field::SourceLayerIds as i32);
    assert!(IDXC_FIELD_TOPK_FREQ == Field::TopkFreq as i32);
    assert!(IDXC_FIELD_DEFAULT == Field::Default as i32);
};

/// What a plan needs to know of the model besides the pattern.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct idxc_model_desc {
    /// `sizeof(idxc_model_desc)`, set by `IDXC_MODEL_DESC_INIT`.
    pub struct_size: u32,
    /// `IDXC_FLAG_MTP_SHARES`, `IDXC_FLAG_INDEX_K_BF16`.
    pub flags: u32,
    /// Decoder layers (`num_hidden_layers`), draft layers not counted.
    pub layers: i32,
    /// Tokens that an indexer selects for a row (`index_topk`), 1 to 4096.
    pub topk: i32,
    /// Draft (MTP) layers; their ids follow the decoder layers', and they are Full.
    pub mtp_layers: i32,
    /// Dimension of index K. 0 means 128.
    pub index_head_dim: i32,
}

// SAFETY: repr(C), pairs of 4-byte integers in 8-byte cells.
unsafe impl Descriptor for idxc_model_desc {
    const NAME: &'static str = "idxc_model_desc";
    const FLAGS: u32 = IDXC_FLAG_MTP_SHARES | IDXC_FLAG_INDEX_K_BF16;
}

/// What a plan, or one pipeline stage of it, comes to.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct idxc_plan_info {
    /// `sizeof(idxc_plan_info)`, set by `IDXC_PLAN_INFO_INIT`.
    pub struct_size: u32,
    /// 0.
    pub flags: u32,
    /// Stable hash of all that this plan means on its stage: for prefix-cache and graph keys.
    pub fingerprint: u64,
    /// The same of the whole model, equal on all its stages: for hand-shakes.
    pub model_fingerprint: u64,
    /// First layer of the stage.
    pub first_layer: i32,
    /// One past its last layer, draft layers included.
    pub end_layer: i32,
    /// Decoder layers of the whole model; draft layers have ids from here on.
    pub decoder_layers: i32,
    /// Draft layers of this stage.
    pub mtp_layers: i32,
    /// 1 if later draft steps reuse the draft's own indices.
    pub mtp_shares: i32,
    /// Full decoder layers of this stage.
    pub full_layers: i32,
    /// Shared decoder layers of this stage.
    pub shared_layers: i32,
    /// int32 entries in a row of indices.
    pub topk: i32,
    /// Layers of this stage that own index K: allocate that many, and none for Shared layers.
    pub index_k_slots: i32,
    /// The Full layer of an earlier stage whose indices must be received (`idxc_publish`) before the first layer; -1 if
    /// none.
    pub receives_from_layer: i32,
    /// The Full layer whose indices must be sent on to the next stage after the last layer; -1 if none.
    pub sends_from_layer: i32,
    /// The Shared layer that this stage runs as Full because of `IDXC_FLAG_PROMOTE`; -1 if none.
    pub promoted_layer: i32,
    /// Bytes of a row of indices, for buffers and hand-off.
    pub row_bytes: i64,
    /// Bytes of index K a token on this stage.
    pub index_k_bytes_per_token: f64,
    /// Bytes of index K a token that the Shared layers do without.
    pub index_k_bytes_saved_per_token: f64,
    /// `IDXC_FIELD_…`: what decided the pattern.
    pub field: i32,
    /// `IDXC_DIALECT_…` if a frequency decided, else -1.
    pub dialect: i32,
    /// Number of notes (see `IDXC_EXPORT_JSON`): fields that were overruled, switched off or assumed.
    pub notes: i32,
    /// 0.
    pub reserved: i32,
}

// SAFETY: repr(C), 8-byte fields and pairs of 4-byte ones in 8-byte cells.
unsafe impl Descriptor for idxc_plan_info {
    const NAME: &'static str = "idxc_plan_info";
}

/// What one layer does.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct idxc_layer_info {
    /// `sizeof(idxc_layer_info)`, set by `IDXC_LAYER_INFO_INIT`.
    pub struct_size: u32,
    /// 0.
    pub flags: u32,
    /// `IDXC_ROLE_…`.
    pub role: i32,
    /// The layer whose indices it uses (itself if Full, maybe on an earlier stage if Shared); -1 if none.
    pub source_layer: i32,
    /// Compact number of the index K that its indexer scores; -1 unless Full.
    pub index_k_slot: i32,
    /// The layer that writes that index K (itself, unless the model shares index K between indexers); -1 unless Full.
    pub index_k_owner: i32,
    /// Tokens that one selected entry names: 1, or a block.
    pub block: i32,
    /// Tokens that one row of index K stands for: 1, or a pool.
    pub key_pool: i32,
}

// SAFETY: repr(C), pairs of 4-byte integers in 8-byte cells.
unsafe impl Descriptor for idxc_layer_info {
    const NAME: &'static str = "idxc_layer_info";
}

fn c_int(value: u64) -> i32 {
    i32::try_from(value).unwrap_or(i32::MAX)
}

fn c_layer(value: Option<u32>) -> i32 {
    value.map_or(-1, |v| c_int(v.into()))
}

/// A count that C passed as int32.
fn count(value: i32, name: &'static str) -> Result<u32> {
    u32::try_from(value).map_err(|_| Error::invalid(name, "a number not negative", value))
}

/// # Safety
/// `desc` is NULL or valid.
unsafe fn model(desc: *const idxc_model_desc) -> Result<(Indexers, Model)> {
    // SAFETY: by this function's contract.
    let d = unsafe { descriptor(desc, "model") }?;
    let indexers = Indexers::any(count(d.layers, "model->layers")?.into())?;
    let mut model = Model::new(count(d.topk, "model->topk")?);
    model.mtp_layers = count(d.mtp_layers, "model->mtp_layers")?;
    model.mtp_shares = d.flags & IDXC_FLAG_MTP_SHARES != 0;
    if d.index_head_dim != 0 {
        model.index_head_dim = count(d.index_head_dim, "model->index_head_dim")?;
    }
    if d.flags & IDXC_FLAG_INDEX_K_BF16 != 0 {
        model.index_k = IndexKFormat::Bf16;
    }
    Ok((indexers, model))
}

/// The common end of all constructors: `out` was checked and cleared by [`begin`].
///
/// # Safety
/// `desc` is NULL or valid; `out` may be written.
unsafe fn create(
    desc: *const idxc_model_desc,
    spelling: &Spelling<'_>,
    out: *mut *mut idxc_plan,
) -> Result<()> {
    // SAFETY: by this function's contract.
    unsafe {
        let (indexers, model) = model(desc)?;
        let plan = Plan::new(Pattern::new(spelling, &indexers)?, model)?;
        give(out, idxc_plan(Arc::new(plan)));
    }
    Ok(())
}

/// Checks and clears the output of a constructor.
///
/// # Safety
/// `out` is NULL or may be written.
unsafe fn begin(out: *mut *mut idxc_plan) -> Result<()> {
    out_pointer(out, "out")?;
    // SAFETY: checked.
    unsafe { out.write(std::ptr::null_mut()) };
    Ok(())
}

/// Makes a plan from `index_topk_pattern`: one `F`, `S` or `-` a decoder layer, in `pattern`.
///
/// - Ownership: `*out` is the caller's, for `idxc_plan_destroy`.
/// - Threads: any.
/// - Stream: none.
/// - Graph capture: not allowed; allocates.
/// - Errors: `IDXC_ERR_CONFIG` (length, letter, first layer Shared, topk …), `IDXC_ERR_INVALID` (pointer, descriptor).
///   `*out` is NULL after an error.
///
/// # Safety
/// Pointers are NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn idxc_plan_from_pattern(
    model: *const idxc_model_desc,
    pattern: *const c_char,
    out: *mut *mut idxc_plan,
) -> idxc_status {
    guard("idxc_plan_from_pattern", || {
        // SAFETY: by this function's contract.
        unsafe {
            begin(out)?;
            create(model, &Spelling::Letters(text(pattern, "pattern")?), out)
        }
    })
}

/// Makes a plan from `indexer_types`: `types[0 … count - 1]`, each `"full"` or `"shared"`, one a decoder layer.
///
/// - Ownership: `*out` is the caller's, for `idxc_plan_destroy`.
/// - Threads: any.
/// - Stream: none.
/// - Graph capture: not allowed; allocates.
/// - Errors: as `idxc_plan_from_pattern`.
///
/// # Safety
/// Pointers are NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn idxc_plan_from_indexer_types(
    model: *const idxc_model_desc,
    types: *const *const c_char,
    count: usize,
    out: *mut *mut idxc_plan,
) -> idxc_status {
    guard("idxc_plan_from_indexer_types", || {
        // SAFETY: by this function's contract.
        unsafe {
            begin(out)?;
            let types = slice(types, count, "types")?;
            let types: Vec<&str> =
                types.iter().map(|&t| text(t, "types")).collect::<Result<_>>()?;
            create(model, &Spelling::IndexerTypes(&types), out)
        }
    })
}

/// Makes a plan from `index_topk_freq` and `index_skip_topk_offset` under the rule of `dialect` (`IDXC_DIALECT_…`).
/// `offset` NULL means the dialect's default.
///
/// - Ownership: `*out` is the caller's, for `idxc_plan_destroy`.
/// - Threads: any.
/// - Stream: none.
/// - Graph capture: not allowed; allocates.
/// - Errors: as `idxc_plan_from_pattern`.
///
/// # Safety
/// Pointers are NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn idxc_plan_from_freq(
    model: *const idxc_model_desc,
    dialect: i32,
    freq: i64,
    offset: *const i64,
    out: *mut *mut idxc_plan,
) -> idxc_status {
    guard("idxc_plan_from_freq", || {
        // SAFETY: by this function's contract.
        unsafe {
            begin(out)?;
            let offset = slice(offset, usize::from(!offset.is_null()), "offset")?.first().copied();
            create(model, &Spelling::Freq { freq, offset, dialect: dialect_from(dialect)? }, out)
        }
    })
}

fn dialect_from(value: i32) -> Result<Dialect> {
    Dialect::ALL
        .into_iter()
        .find(|d| *d as i32 == value)
        .ok_or_else(|| Error::invalid("dialect", "an IDXC_DIALECT_ number", value))
}

/// Makes a plan from the list of its Full layers, ascending (`index_source_layer_ids`, or a list of layers that keep
/// their indexer).
///
/// - Ownership: `*out` is the caller's, for `idxc_plan_destroy`.
/// - Threads: any.
/// - Stream: none.
/// - Graph capture: not allowed; allocates.
/// - Errors: as `idxc_plan_from_pattern`.
///
/// # Safety
/// Pointers are NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn idxc_plan_from_source_layers(
    model: *const idxc_model_desc,
    layers: *const i64,
    count: usize,
    out: *mut *mut idxc_plan,
) -> idxc_status {
    guard("idxc_plan_from_source_layers", || {
        // SAFETY: by this function's contract.
        unsafe {
            begin(out)?;
            create(model, &Spelling::SourceLayers(slice(layers, count, "layers")?), out)
        }
    })
}

/// Makes a plan from the text of a Hugging Face `config.json`. Which field decided is in `idxc_plan_info.field`; what
/// was overruled, switched off or assumed is in the notes, and sent to the log callback as warnings.
///
/// - Ownership: `json` (`size` bytes, need not end in NUL) is the caller's; `*out` is the caller's, for
///   `idxc_plan_destroy`.
/// - Threads: any.
/// - Stream: none.
/// - Graph capture: not allowed; allocates.
/// - Errors: `IDXC_ERR_CONFIG` (not JSON, fields that are missing, wrong or disagree), `IDXC_ERR_INVALID` (pointer).
///   `*out` is NULL after an error.
///
/// # Safety
/// Pointers are NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn idxc_plan_from_hf_config(
    json: *const c_char,
    size: usize,
    out: *mut *mut idxc_plan,
) -> idxc_status {
    guard("idxc_plan_from_hf_config", || {
        // SAFETY: by this function's contract.
        let json = unsafe {
            begin(out)?;
            slice(json.cast::<u8>(), size, "json")?
        };
        let plan = Plan::from_hf_config(json)?;
        for note in plan.notes() {
            log(IDXC_LOG_WARNING, &format!("config: {note}"));
        }
        // SAFETY: checked by `begin`.
        unsafe { give(out, idxc_plan(Arc::new(plan))) };
        Ok(())
    })
}

/// Makes the plan of a pipeline stage: layers `first … end - 1`, which keep their ids. `flags`: `IDXC_FLAG_PROMOTE`, or 0.
/// Cut all stages with the same flags, so that both ends of a hand-off agree.
///
/// - Ownership: `*out` is the caller's, for `idxc_plan_destroy`; it does not depend on `plan`.
/// - Threads: any.
/// - Stream: none.
/// - Graph capture: not allowed; allocates.
/// - Errors: `IDXC_ERR_INVALID` (argument named). `*out` is NULL after an error.
///
/// # Safety
/// Pointers are NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn idxc_plan_slice(
    plan: *const idxc_plan,
    first: i32,
    end: i32,
    flags: u32,
    out: *mut *mut idxc_plan,
) -> idxc_status {
    guard("idxc_plan_slice", || {
        // SAFETY: by this function's contract.
        let plan = unsafe {
            begin(out)?;
            handle(plan, "plan")?
        };
        if flags & !IDXC_FLAG_PROMOTE != 0 {
            return Err(Error::invalid("flags", "0 or IDXC_FLAG_PROMOTE (1)", flags));
        }
        let part = plan.0.slice(
            count(first, "first")?,
            count(end, "end")?,
            flags & IDXC_FLAG_PROMOTE != 0,
        )?;
        if let Some(layer) = part.promoted() {
            log(
                IDXC_LOG_WARNING,
                &format!("stage {first}..{end}: layer {layer} was Shared and runs as Full"),
            );
        }
        // SAFETY: checked by `begin`.
        unsafe { give(out, idxc_plan(Arc::new(part))) };
        Ok(())
    })
}

/// Frees a plan. NULL is fine. Caches made with it stay usable.
///
/// - Ownership: takes `plan`, which must not be used again.
/// - Threads: any, when no other thread is in a call with this handle.
/// - Stream: none.
/// - Graph capture: allowed; host only.
/// - Errors: none.
///
/// # Safety
/// `plan` is NULL or a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn idxc_plan_destroy(plan: *mut idxc_plan) {
    // SAFETY: by this function's contract.
    unsafe { take("idxc_plan_destroy", plan) }
}

/// What the plan comes to.
///
/// - Ownership: `info` is the caller's.
/// - Threads: any.
/// - Stream: none.
/// - Graph capture: allowed; host only.
/// - Errors: `IDXC_ERR_INVALID`.
///
/// # Safety
/// Pointers are NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn idxc_plan_get_info(
    plan: *const idxc_plan,
    info: *mut idxc_plan_info,
) -> idxc_status {
    guard("idxc_plan_get_info", || {
        // SAFETY: by this function's contract.
        let plan = &unsafe { handle(plan, "plan") }?.0;
        let value = idxc_plan_info {
            struct_size: 0,
            flags: 0,
            fingerprint: plan.fingerprint(),
            model_fingerprint: plan.model_fingerprint(),
            first_layer: c_int(plan.stage().start.into()),
            end_layer: c_int(plan.stage().end.into()),
            decoder_layers: c_int(plan.decoder_layers().into()),
            mtp_layers: c_int(plan.mtp_layers().into()),
            mtp_shares: i32::from(plan.mtp_shares()),
            full_layers: c_int(plan.count(Role::Full).into()),
            shared_layers: c_int(plan.count(Role::Shared).into()),
            topk: c_int(plan.model().row_width().into()),
            index_k_slots: c_int(plan.index_k_layers().len() as u64),
            receives_from_layer: c_layer(plan.receive().map(|h| h.source)),
            sends_from_layer: c_layer(plan.send().map(|h| h.source)),
            promoted_layer: c_layer(plan.promoted()),
            row_bytes: plan.row_bytes() as i64,
            index_k_bytes_per_token: plan.index_k_bytes_per_token(),
            index_k_bytes_saved_per_token: plan.index_k_bytes_saved_per_token(),
            field: plan.origin().field as i32,
            dialect: plan.origin().dialect.map_or(-1, |d| d as i32),
            notes: c_int(plan.notes().len() as u64),
            reserved: 0,
        };
        // SAFETY: by this function's contract.
        unsafe { give_struct(info, "info", value) }
    })
}

/// Role of a layer, `IDXC_ROLE_…`; -1 for a NULL plan or a layer that is not the plan's. For the hot path.
///
/// - Ownership: nothing changes hands.
/// - Threads: any.
/// - Stream: none.
/// - Graph capture: allowed; host only.
/// - Errors: -1 as above; the text is in `idxc_last_error()`.
///
/// # Safety
/// `plan` is NULL or a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn idxc_plan_layer_role(plan: *const idxc_plan, layer: i32) -> i32 {
    let mut role = -1;
    guard("idxc_plan_layer_role", || {
        // SAFETY: by this function's contract.
        let plan = unsafe { handle(plan, "plan") }?;
        role = plan.0.role(count(layer, "layer")?)? as i32;
        Ok(())
    });
    role
}

/// What one layer does.
///
/// - Ownership: `info` is the caller's.
/// - Threads: any.
/// - Stream: none.
/// - Graph capture: allowed; host only.
/// - Errors: `IDXC_ERR_INVALID` (a layer that is not the plan's).
///
/// # Safety
/// Pointers are NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn idxc_plan_layer_get_info(
    plan: *const idxc_plan,
    layer: i32,
    info: *mut idxc_layer_info,
) -> idxc_status {
    guard("idxc_plan_layer_get_info", || {
        // SAFETY: by this function's contract.
        let plan = unsafe { handle(plan, "plan") }?;
        let l = plan.0.layer(count(layer, "layer")?)?;
        let value = idxc_layer_info {
            struct_size: 0,
            flags: 0,
            role: l.role as i32,
            source_layer: c_layer(l.source),
            index_k_slot: c_layer(l.index_k_slot),
            index_k_owner: c_layer(l.index_k_owner),
            block: c_int(l.block.into()),
            key_pool: c_int(l.key_pool.into()),
        };
        // SAFETY: by this function's contract.
        unsafe { give_struct(info, "info", value) }
    })
}

/// Writes the plan in somebody's spelling (`IDXC_EXPORT_…`), as NUL-terminated text. `dialect` (`IDXC_DIALECT_…`) counts
/// for `IDXC_EXPORT_FREQ` only. `*size` receives the bytes needed, NUL included; with `buffer` NULL and `capacity` 0 that
/// is all that happens.
///
/// - Ownership: `buffer` is the caller's.
/// - Threads: any.
/// - Stream: none.
/// - Graph capture: allowed; host only.
/// - Errors: `IDXC_ERR_INVALID`, `IDXC_ERR_CONFIG` (not expressible that way), `IDXC_ERR_BUFFER_TOO_SMALL` (`*size` is set).
///
/// # Safety
/// Pointers are NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn idxc_plan_export(
    plan: *const idxc_plan,
    format: i32,
    dialect: i32,
    buffer: *mut c_char,
    capacity: usize,
    size: *mut usize,
) -> idxc_status {
    guard("idxc_plan_export", || {
        // SAFETY: by this function's contract.
        let plan = unsafe { handle(plan, "plan") }?;
        let format = match format {
            IDXC_EXPORT_PATTERN => ExportFormat::Letters,
            IDXC_EXPORT_COMPACT_PATTERN => ExportFormat::Compact,
            IDXC_EXPORT_INDEXER_TYPES => ExportFormat::IndexerTypes,
            IDXC_EXPORT_FREQ => ExportFormat::Freq(dialect_from(dialect)?),
            IDXC_EXPORT_SOURCE_LAYERS => ExportFormat::SourceLayers,
            IDXC_EXPORT_JSON => ExportFormat::Json,
            other => return Err(Error::invalid("format", "an IDXC_EXPORT_ number", other)),
        };
        // SAFETY: by this function's contract.
        unsafe { give_text(&plan.0.export(format)?, buffer, capacity, size) }
    })
}
