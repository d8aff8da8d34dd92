//! The function table: everything a host needs after one `dlsym`.

use super::cache::*;
use super::context::*;
use super::ops::*;
use super::plan::*;
use super::search::*;
use super::*;

/// Makes the table and the list of its names, so that neither can miss what the other has. The header's struct is
/// generated from the list (`tests/header.rs`), the types from the functions themselves.
macro_rules! api_table {
    ($($name:ident),* $(,)?) => {
        /// Names of the table's entries, in order.
        #[doc(hidden)]
        pub const NAMES: &[&str] = &[$(stringify!($name)),*];

        /// `idxc_api`: two integers, then the functions.
        #[repr(C)]
        struct Table {
            struct_size: u32,
            version: u32,
            functions: [*const (); NAMES.len()],
        }

        // SAFETY: never written.
        unsafe impl Sync for Table {}

        static TABLE: Table = Table {
            struct_size: size_of::<Table>() as u32,
            version: IDXC_ABI_VERSION,
            functions: [$($name as *const ()),*],
        };
    };
}

// Append only: an entry's place is part of the ABI.
api_table! {
    idxc_version,
    idxc_status_name,
    idxc_last_error,
    idxc_set_log_callback,
    idxc_context_create,
    idxc_context_destroy,
    idxc_context_get_info,
    idxc_plan_from_pattern,
    idxc_plan_from_indexer_types,
    idxc_plan_from_freq,
    idxc_plan_from_source_layers,
    idxc_plan_from_hf_config,
    idxc_plan_slice,
    idxc_plan_destroy,
    idxc_plan_get_info,
    idxc_plan_layer_role,
    idxc_plan_layer_get_info,
    idxc_plan_export,
    idxc_cache_size,
    idxc_cache_create,
    idxc_cache_destroy,
    idxc_step_begin,
    idxc_step_carry,
    idxc_select_workspace,
    idxc_select,
    idxc_slot,
    idxc_publish,
    idxc_indices,
    idxc_export,
    idxc_lane_get_info,
    idxc_attend_workspace,
    idxc_attend,
    idxc_index_k_write,
    idxc_index_q_quantize,
    idxc_indexer_logits,
    idxc_paged_indexer_logits,
    idxc_topk_workspace,
    idxc_topk,
    idxc_indices_to_slots,
    idxc_kv_write,
    idxc_sparse_attention_workspace,
    idxc_sparse_attention,
    idxc_indices_overlap,
    idxc_search_create,
    idxc_search_next,
    idxc_search_report,
    idxc_search_save,
    idxc_search_resume,
    idxc_search_result,
    idxc_search_destroy,
    idxc_distill_workspace,
    idxc_distill,
}

/// Every function of this header, by place: the only symbol that a host which loads the library with `dlopen` has to
/// look up. Entries are only ever appended; check `struct_size` before using one that is newer than your minimum.
///
/// Returns NULL if the library is older than `version` (pass `IDXC_ABI_VERSION`).
///
/// - Ownership: the table is static.
/// - Threads: any.
/// - Stream: none.
/// - Graph capture: allowed; host only.
/// - Errors: NULL as above; the text is in `idxc_last_error()`.
#[unsafe(no_mangle)]
pub extern "C" fn idxc_get_api(version: u32) -> *const idxc_api {
    let mut table = std::ptr::null();
    guard("idxc_get_api", || {
        if version == 0 || version > IDXC_ABI_VERSION {
            return Err(Error::invalid(
                "version",
                format_args!("1 to {IDXC_ABI_VERSION}"),
                version,
            ));
        }
        table = (&raw const TABLE).cast();
        Ok(())
    });
    table
}

/// Opaque here; the header spells it out.
pub struct idxc_api([u8; 0]);
