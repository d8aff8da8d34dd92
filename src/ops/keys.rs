//! Rows, and where the keys that a row sees are stored.

use crate::error::{Error, Result};
use crate::tensor::{Tensor, View};

/// How logical position `p` of a row becomes a row number ("slot") of the key or KV store.
///
/// With `block_table`: `slot = table[request(r)][p / page] * page + p % page`. Without: `slot = row_start[r] + p`.
#[derive(Clone, Copy, Debug, Default)]
pub struct KeyMapArgs<'a> {
    /// int32 `[requests, max_pages]`: page number of each page of a request. Absent: keys lie contiguously.
    pub block_table: Option<Tensor<'a>>,
    /// int32 `[rows]`: the block-table row of each row, -1 for a padding row. Absent: rows are split evenly,
    /// row `r` belongs to request `r / (rows / requests)`.
    pub row_request: Option<Tensor<'a>>,
    /// int32 `[rows]`, contiguous only: first key row that the row may see. Absent: 0.
    pub row_start: Option<Tensor<'a>>,
    /// int32 `[rows]`: one past the last key row that the row may see (paged: its number of visible tokens).
    /// `row_end <= row_start` is an empty (padding) row.
    pub row_end: Option<Tensor<'a>>,
}

/// The store that a map points into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Store {
    /// This many rows, one after the other.
    Contiguous(usize),
    /// Pages of so many rows.
    Paged {
        /// Pages in the store.
        pages: usize,
        /// Rows a page.
        page: usize,
    },
}

/// The one home of "logical position to slot". Shapes are checked; what is in the arrays is the backend's to check,
/// because it may lie on a device.
#[derive(Clone, Copy, Debug)]
pub struct KeyMap<'a> {
    /// As in [`KeyMapArgs`]; present exactly when the store is paged.
    pub block_table: Option<View<'a, i32, 2>>,
    /// As in [`KeyMapArgs`].
    pub row_request: Option<View<'a, i32, 1>>,
    /// As in [`KeyMapArgs`].
    pub row_start: Option<View<'a, i32, 1>>,
    /// As in [`KeyMapArgs`].
    pub row_end: Option<View<'a, i32, 1>>,
    /// What slots are numbers of.
    pub store: Store,
    /// Rows a request, when `row_request` is absent.
    pub rows_per_request: usize,
}

impl<'a> KeyMapArgs<'a> {
    /// The tensors that are there.
    pub(super) fn tensors(&self) -> [Option<&Tensor<'a>>; 4] {
        [&self.block_table, &self.row_request, &self.row_start, &self.row_end].map(|t| t.as_ref())
    }

    /// Checks shapes for an operation on `rows` rows.
    pub fn check(self, rows: usize, store: Store) -> Result<KeyMap<'a>> {
        let refuse = |t: Option<Tensor<'_>>, why| match t {
            Some(t) => Err(Error::invalid(t.name(), why, format_args!("shape {:?}", t.shape()))),
            None => Ok(()),
        };
        let mut rows_per_request = rows.max(1);
        let block_table = match (self.block_table, store) {
            (None, Store::Paged { .. }) => {
                return Err(Error::invalid("block_table", "a block table for paged keys", "none"));
            }
            (t @ Some(_), Store::Contiguous(_)) => {
                refuse(t, "none with contiguous keys")?;
                None
            }
            (Some(t), Store::Paged { .. }) => {
                refuse(self.row_start, "none with a block table")?;
                let table = t.view::<i32, 2>()?;
                let requests = table.shape()[0];
                if self.row_request.is_none() && rows > 0 {
                    if requests == 0 || !rows.is_multiple_of(requests) {
                        return Err(Error::invalid(
                            "row_request",
                            "a request for each row, or rows that split evenly over requests",
                            format_args!("none, {rows} rows and {requests} requests"),
                        ));
                    }
                    rows_per_request = rows / requests;
                }
                Some(table)
            }
            (None, Store::Contiguous(_)) => {
                refuse(self.row_request, "none without a block table")?;
                None
            }
        };
        Ok(KeyMap {
            block_table,
            row_request: super::per_row(self.row_request, rows)?,
            row_start: super::per_row(self.row_start, rows)?,
            row_end: super::per_row(self.row_end, rows)?,
            store,
            rows_per_request,
        })
    }
}

impl<'a> KeyMap<'a> {
    /// Most positions that a row can have, by the shapes alone.
    pub fn max_len(&self) -> usize {
        match (self.store, &self.block_table) {
            (Store::Paged { page, .. }, Some(t)) => t.shape()[1].saturating_mul(page),
            (Store::Paged { .. }, None) => 0,
            (Store::Contiguous(keys), _) => keys,
        }
    }

    /// Rows of the store.
    pub fn slots(&self) -> usize {
        match self.store {
            Store::Contiguous(n) => n,
            Store::Paged { pages, page } => pages.saturating_mul(page),
        }
    }

    /// Host only: the request of a row, `None` for a padding row. Contiguous rows are all of request 0.
    pub fn request(&self, row: usize) -> Option<usize> {
        match self.row_request {
            Some(v) => usize::try_from(v.row(&[])[row]).ok(),
            None => Some(row / self.rows_per_request),
        }
    }

    /// Host only: slot of logical position 0 (contiguous).
    pub fn start(&self, row: usize) -> i64 {
        self.row_start.map_or(0, |v| i64::from(v.row(&[])[row]))
    }

    /// Host only: how many positions a row sees. `row_end` absent: all that the store or the table has.
    pub fn len(&self, row: usize) -> usize {
        if self.request(row).is_none() {
            return 0;
        }
        let end = match self.row_end {
            Some(v) => i64::from(v.row(&[])[row]),
            None => self.max_len() as i64,
        };
        (end - self.start(row)).max(0) as usize
    }

    /// Host only: the block-table row of a row that is not padding.
    pub fn table(&self, row: usize) -> Option<&'a [i32]> {
        Some(self.block_table?.row(&[self.request(row)?]))
    }

    /// Host only: slot of a logical position, whatever the arrays say: it may lie outside the store. `None` for a
    /// padding row and for a position that the block table does not have.
    pub fn slot(&self, row: usize, position: usize) -> Option<i64> {
        match self.store {
            Store::Contiguous(_) => Some(self.start(row) + position as i64),
            Store::Paged { page, .. } => {
                let number = *self.table(row)?.get(position / page)?;
                (number >= 0).then(|| i64::from(number) * page as i64 + (position % page) as i64)
            }
        }
    }
}
