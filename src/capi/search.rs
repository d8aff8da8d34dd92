//! `idxc_search`: greedy search for the layers that keep their indexer.

use super::types::{Descriptor, descriptor, give_struct};
use super::{
    give, give_text, guard, handle, handle_mut, idxc_status, out_pointer, slice, take, text,
};
use crate::error::{Error, Result};
use crate::plan::Pattern;
use crate::search::{Calibration, Method, Search, Spec};
use std::ffi::{CString, c_char};

/// A search for the layers that keep their indexer. One thread at a time.
///
/// Starts with all layers Full. Each step turns Shared the one layer whose turn gives the lowest loss, ties to the
/// lowest layer; each pattern's Full layers are among those of the pattern before, so one search serves every share of
/// Full layers. The host measures the losses, in whatever way it runs its model:
///
///   idxc_search_create(&desc, &search);                     or idxc_search_resume(&desc, path, &search)
///   idxc_search_save(search, path);                         from here on it may be killed at any moment
///   while (idxc_search_next(search, &candidate) == IDXC_OK && candidate.pattern)
///     idxc_search_report(search, candidate.pattern, ... the model's loss with that pattern ...);
///   idxc_search_result(search, json, sizeof json, &size);
///
/// What is asked next follows from the descriptor and the losses reported so far, and from nothing else.
pub struct idxc_search {
    search: Search,
    /// What `idxc_search_next` lends out.
    pattern: CString,
    base: CString,
}

/// Method: each step tries every flip, `layers * (layers - 1) / 2` in all.
pub const IDXC_SEARCH_GREEDY: i32 = 0;
/// Method: each step tries the `few` flips that raised the loss least when they were last tried. Steps 1, 2, 4, 8, … (of
/// each stage) try every flip, which keeps that ranking fresh and shows how often the few would have missed the best.
pub const IDXC_SEARCH_LAZY: i32 = 1;

/// What to search, for which model, on which calibration set.
///
/// Layers are the decoder layers that have an indexer, numbered from 0: where a model has others between them, patterns
/// are in the short form of `index_topk_pattern` (`IDXC_EXPORT_COMPACT_PATTERN`). Draft layers do not count.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct idxc_search_desc {
    /// `sizeof(idxc_search_desc)`, set by `IDXC_SEARCH_DESC_INIT`.
    pub struct_size: u32,
    /// 0.
    pub flags: u32,
    /// Layers of a pattern, 2 to 4096.
    pub layers: i32,
    /// Tokens that an indexer selects for a row, also where it selects them in blocks.
    pub topk: i32,
    /// UTF-8, not empty: the host's name for exactly this model, such as a hash of its weights. A search does not resume
    /// under another name.
    pub model: *const c_char,
    /// UTF-8, not empty: the host's name for exactly the calibration rows, such as a hash of their tokens. As above.
    pub calibration: *const c_char,
    /// Tokens of each calibration row, `row_lengths_count` of them. All must be more than `topk`: in shorter rows every
    /// layer selects everything, so reuse is exact there and the loss says nothing.
    pub row_lengths: *const i64,
    /// Calibration rows, 1 or more.
    pub row_lengths_count: usize,
    /// Layers that stay Full, ascending, `pinned_count` of them. Layer 0 and the first layer of each stage always do.
    pub pinned: *const i32,
    /// 0: no others.
    pub pinned_count: usize,
    /// First layer of each pipeline stage, ascending, `stages_count` of them; layer 0 may be left out. The steps then
    /// take turns, stage by stage, and each tries the flips of its own stage only: so many times fewer evaluations, and
    /// no stage ever needs another's indices.
    pub stages: *const i32,
    /// 0: one stage.
    pub stages_count: usize,
    /// `IDXC_SEARCH_GREEDY` or `IDXC_SEARCH_LAZY`.
    pub method: i32,
    /// `IDXC_SEARCH_LAZY`: flips that a step tries, 1 or more. Otherwise 0.
    pub few: i32,
    /// Full layers to stop at. 0: stop when only pinned layers are Full.
    pub target_full_layers: i32,
    /// Full layers of the pattern to refine after the last step: the Full and the Shared layer of one stage whose
    /// exchange lowers the loss most are exchanged, until no exchange lowers it. 0: no refinement.
    pub swap_full_layers: i32,
}

/// A pattern to measure. The strings are the search's, and valid until the next `idxc_search_report` or
/// `idxc_search_destroy` on it.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct idxc_search_candidate {
    /// `sizeof(idxc_search_candidate)`, set by `IDXC_SEARCH_CANDIDATE_INIT`.
    pub struct_size: u32,
    /// 0.
    pub flags: u32,
    /// One `F` or `S` a layer; NULL when the search is complete.
    pub pattern: *const c_char,
    /// The pattern that the search has got to, of which `pattern` is a small change; NULL when the search is complete.
    pub base: *const c_char,
    /// Losses reported so far.
    pub evaluations: i64,
    /// Losses that the whole search takes. Exact, except that refinement counts with the round it is in or will begin
    /// with: each exchange adds another.
    pub expected: i64,
    /// The first layer whose role differs from `base`. What enters it (hidden states, and the indices of the last Full
    /// layer before it) is what enters it under `base`: a host that kept that from one run of `base` starts here, with
    /// the same result. 0 for the all-Full pattern, which comes first; -1 when the search is complete.
    pub first_changed_layer: i32,
    /// 0.
    pub reserved: i32,
}

// SAFETY: repr(C), pointers, sizes and pairs of 4-byte integers in 8-byte cells; NULL and 0 are the defaults.
unsafe impl Descriptor for idxc_search_desc {
    const NAME: &'static str = "idxc_search_desc";
}
// SAFETY: as above.
unsafe impl Descriptor for idxc_search_candidate {
    const NAME: &'static str = "idxc_search_candidate";
}

impl idxc_search {
    fn new(search: Search) -> Self {
        let mut this = Self { search, pattern: CString::default(), base: CString::default() };
        this.lend();
        this
    }

    /// Spells the next candidate for C.
    fn lend(&mut self) {
        // Letters only: no NUL among them.
        let spell = |pattern: &Pattern| CString::new(pattern.to_string()).unwrap_or_default();
        if let Some(next) = self.search.next() {
            (self.pattern, self.base) = (spell(&next.pattern), spell(&next.base));
        }
    }
}

/// A number that C passed as a signed integer.
fn unsigned<T: TryFrom<i64>>(value: i64, name: &str) -> Result<T> {
    T::try_from(value).map_err(|_| Error::invalid(name, "a number not negative", value))
}

/// The layers of a list.
///
/// # Safety
/// `list` is NULL or has `count` elements.
unsafe fn layers(list: *const i32, count: usize, name: &'static str) -> Result<Vec<u32>> {
    // SAFETY: by this function's contract.
    unsafe { slice(list, count, name) }?.iter().map(|&l| unsigned(l.into(), name)).collect()
}

/// # Safety
/// `desc` is NULL or valid, with all that it points to.
unsafe fn spec(desc: *const idxc_search_desc) -> Result<Spec> {
    // SAFETY: by this function's contract.
    unsafe {
        let d = descriptor(desc, "desc")?;
        let rows = slice(d.row_lengths, d.row_lengths_count, "row_lengths")?;
        let calibration = Calibration {
            fingerprint: text(d.calibration, "calibration")?.to_owned(),
            row_lengths: rows.iter().map(|&n| unsigned(n, "row_lengths")).collect::<Result<_>>()?,
        };
        let few = unsigned(d.few.into(), "few")?;
        let method = match (d.method, few) {
            (IDXC_SEARCH_GREEDY, 0) => Method::Greedy,
            (IDXC_SEARCH_GREEDY, _) => {
                return Err(Error::invalid("few", "0 for IDXC_SEARCH_GREEDY", few));
            }
            (IDXC_SEARCH_LAZY, few) => Method::Lazy { few },
            (other, _) => {
                return Err(Error::invalid("method", "0 (greedy) or 1 (lazy)", other));
            }
        };
        let optional = |value: i32, name| -> Result<Option<u32>> {
            Ok(Some(unsigned(value.into(), name)?).filter(|v| *v != 0))
        };
        Ok(Spec {
            layers: unsigned(d.layers.into(), "layers")?,
            topk: unsigned(d.topk.into(), "topk")?,
            model: text(d.model, "model")?.to_owned(),
            calibration,
            pinned: layers(d.pinned, d.pinned_count, "pinned")?,
            stages: layers(d.stages, d.stages_count, "stages")?,
            method,
            target_full_layers: optional(d.target_full_layers, "target_full_layers")?,
            swap_full_layers: optional(d.swap_full_layers, "swap_full_layers")?,
        })
    }
}

/// Begins a search.
///
/// - Ownership: `*out` is the caller's, for `idxc_search_destroy`. Nothing of `desc` is kept.
/// - Threads: any; the search itself is for one thread at a time.
/// - Stream: none.
/// - Graph capture: not allowed; allocates.
/// - Errors: `IDXC_ERR_INVALID` (field named; a calibration row that is not longer than `topk`). `*out` is NULL after an
///   error.
///
/// # Safety
/// Pointers are NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn idxc_search_create(
    desc: *const idxc_search_desc,
    out: *mut *mut idxc_search,
) -> idxc_status {
    guard("idxc_search_create", || {
        out_pointer(out, "out")?;
        // SAFETY: `out` was checked; the rest by this function's contract.
        unsafe {
            out.write(std::ptr::null_mut());
            let search = Search::new(&spec(desc)?)?;
            give(out, idxc_search::new(search));
        }
        Ok(())
    })
}

/// Tells what to measure: the same candidate until its loss is reported, and `pattern` NULL when the search is complete.
/// The loss is the mean over all calibration rows, the same rows each time; lower is better.
///
/// - Ownership: `candidate` is the caller's; its strings are the search's, see there.
/// - Threads: the search's.
/// - Stream: none.
/// - Graph capture: allowed; host only.
/// - Errors: `IDXC_ERR_INVALID`.
///
/// # Safety
/// Pointers are NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn idxc_search_next(
    search: *const idxc_search,
    candidate: *mut idxc_search_candidate,
) -> idxc_status {
    guard("idxc_search_next", || {
        // SAFETY: by this function's contract.
        let this = unsafe { handle(search, "search") }?;
        let progress = this.search.progress();
        let next = this.search.next();
        let lent = |text: &CString| next.map_or(std::ptr::null(), |_| text.as_ptr());
        let c_int = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        let value = idxc_search_candidate {
            struct_size: 0,
            flags: 0,
            pattern: lent(&this.pattern),
            base: lent(&this.base),
            evaluations: c_int(progress.evaluations),
            expected: c_int(progress.expected),
            first_changed_layer: next.map_or(-1, |n| n.first_changed_layer.cast_signed()),
            reserved: 0,
        };
        // SAFETY: by this function's contract.
        unsafe { give_struct(candidate, "candidate", value) }
    })
}

/// Takes the loss of the pattern that `idxc_search_next` gave: `pattern` is that string, or one equal to it. If the
/// search has a journal, the loss is on the disk when this returns. Reporting a loss again is fine if it is the same.
///
/// - Ownership: nothing changes hands; the candidate's strings are no longer valid.
/// - Threads: the search's.
/// - Stream: none.
/// - Graph capture: not allowed; allocates, and may write a file.
/// - Errors: `IDXC_ERR_INVALID` (a loss that is NaN or infinite, or not the one reported before; a pattern that was not
///   asked for), `IDXC_ERR_CONFIG` (text that is no pattern), `IDXC_ERR_IO` (the journal could not be written; report
///   again). An error changes nothing.
///
/// # Safety
/// Pointers are NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn idxc_search_report(
    search: *mut idxc_search,
    pattern: *const c_char,
    loss: f64,
) -> idxc_status {
    guard("idxc_search_report", || {
        // The text may be the search's own, so it is read before the search is borrowed.
        // SAFETY: by this function's contract.
        let pattern = unsafe { text(pattern, "pattern") }?.parse::<Pattern>();
        // SAFETY: by this function's contract.
        let this = unsafe { handle_mut(search, "search") }?;
        this.search.report(&pattern?, loss)?;
        this.lend();
        Ok(())
    })
}

/// Makes the new file `path` the search's journal: it receives all losses reported so far, and each later one before
/// `idxc_search_report` returns, so the process may be killed at any moment. Does nothing if `path` is the search's
/// journal already. The file is locked as long as this process, or one forked from it, has the search.
///
/// - Ownership: `path` (UTF-8) is the caller's; the file is the search's until `idxc_search_destroy`.
/// - Threads: the search's.
/// - Stream: none.
/// - Graph capture: not allowed; writes a file.
/// - Errors: `IDXC_ERR_INVALID` (`path` exists: `idxc_search_resume` goes on with a search), `IDXC_ERR_IO`. An error
///   leaves the search, and the journal it had, as they were.
///
/// # Safety
/// Pointers are NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn idxc_search_save(
    search: *mut idxc_search,
    path: *const c_char,
) -> idxc_status {
    guard("idxc_search_save", || {
        // SAFETY: by this function's contract.
        let (this, path) = unsafe { (handle_mut(search, "search")?, text(path, "path")?) };
        this.search.save(path)
    })
}

/// Goes on with the search whose journal `path` is, from the last loss that was reported to it; `path` is the journal of
/// the search that is made. Nothing is asked for twice, and the result is that of a search that was never interrupted.
///
/// - Ownership: `*out` is the caller's, for `idxc_search_destroy`. Nothing of `desc` is kept. The file as for
///   `idxc_search_save`.
/// - Threads: any; the search itself is for one thread at a time.
/// - Stream: none.
/// - Graph capture: not allowed; allocates, reads a file and may write it.
/// - Errors: `IDXC_ERR_INVALID` (as `idxc_search_create`; `desc` is not what the search began with, field named;
///   another search has the file open; the file is not a journal, or damaged anywhere but in a last line that was being
///   written), `IDXC_ERR_IO` (no such file, …). `*out` is NULL and the file unchanged after an error.
///
/// # Safety
/// Pointers are NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn idxc_search_resume(
    desc: *const idxc_search_desc,
    path: *const c_char,
    out: *mut *mut idxc_search,
) -> idxc_status {
    guard("idxc_search_resume", || {
        out_pointer(out, "out")?;
        // SAFETY: `out` was checked; the rest by this function's contract.
        unsafe {
            out.write(std::ptr::null_mut());
            let search = Search::resume(text(path, "path")?, &spec(desc)?)?;
            give(out, idxc_search::new(search));
        }
        Ok(())
    })
}

/// Writes what the search has found so far as a JSON object, NUL-terminated; `complete` in it says whether that is all.
/// `*size` receives the bytes needed, NUL included; with `buffer` NULL and `capacity` 0 that is all that happens.
///
/// `patterns` has the pattern of every share of Full layers, `"1/2"`, `"1/4"`, `"1/8"` (rounded up to whole layers) and
/// `"n/layers"` in lowest terms, for `index_topk_pattern`. `steps` has each step's flip with all losses that it
/// compared, `swaps` the exchanges of the refinement (the last one's `pattern` is the refined one; none: nothing was
/// better). `evaluations`, `saved_evaluations` (flips that plain greedy would have tried) and `lazy_differs` (steps of
/// `IDXC_SEARCH_LAZY` that tried all flips to compare, and those at which the few had missed the best) tell the cost.
///
/// - Ownership: `buffer` is the caller's.
/// - Threads: the search's.
/// - Stream: none.
/// - Graph capture: allowed; host only.
/// - Errors: `IDXC_ERR_INVALID`, `IDXC_ERR_BUFFER_TOO_SMALL` (`*size` is set).
///
/// # Safety
/// Pointers are NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn idxc_search_result(
    search: *const idxc_search,
    buffer: *mut c_char,
    capacity: usize,
    size: *mut usize,
) -> idxc_status {
    guard("idxc_search_result", || {
        // SAFETY: by this function's contract.
        let this = unsafe { handle(search, "search") }?;
        // SAFETY: by this function's contract.
        unsafe { give_text(&this.search.result().to_json()?, buffer, capacity, size) }
    })
}

/// Ends a search. NULL is fine. Its journal stays, complete up to the last report, for `idxc_search_resume`.
///
/// - Ownership: takes `search`, which must not be used again.
/// - Threads: any, when no other thread is in a call with this handle.
/// - Stream: none.
/// - Graph capture: not allowed; closes a file.
/// - Errors: none.
///
/// # Safety
/// `search` is NULL or a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn idxc_search_destroy(search: *mut idxc_search) {
    // SAFETY: by this function's contract.
    unsafe { take("idxc_search_destroy", search) }
}
