//! What only the host can check: the numbers in index arrays. Each runs before its operation writes anything; for the
//! CUDA backend in checked mode only, on copies.

use crate::error::{Error, Result, Status};
use crate::ops::{
    Distill, IndexerLogits, IndicesToSlots, KeyMap, Slots, SparseAttention, Store, Target, TopK,
};
use crate::tensor::Device;

/// The backend reads host memory only.
pub(super) fn device(device: Device) -> Result<()> {
    match device {
        Device::Cpu => Ok(()),
        other => Err(Error::new(
            Status::Invalid,
            format!("tensors: expected memory on cpu for this backend, got {other}"),
        )),
    }
}

fn outside(
    name: &str,
    range: impl std::fmt::Display,
    got: impl std::fmt::Display,
    row: usize,
) -> Error {
    Error::invalid(name, range, format_args!("{got} in row {row}"))
}

/// The request of every row, and the bounds of contiguous rows.
fn rows(map: &KeyMap<'_>, rows: usize, use_end: bool) -> Result<()> {
    if let (Some(v), Some(table)) = (map.row_request, map.block_table) {
        let requests = table.shape()[0];
        for (row, &r) in v.row(&[]).iter().enumerate() {
            if r < -1 || r >= 0 && r as usize >= requests {
                let range = format_args!("-1 or a request below {requests}");
                return Err(outside("row_request", range, r, row));
            }
        }
    }
    if let Some(v) = map.row_start {
        for (row, &s) in v.row(&[]).iter().enumerate() {
            if s < 0 || s as usize > map.slots() {
                return Err(outside("row_start", format_args!("0 to {}", map.slots()), s, row));
            }
        }
    }
    if let Some(v) = map.row_end.filter(|_| use_end) {
        let most = map.max_len();
        for row in 0..rows {
            let end = v.row(&[])[row];
            if end > 0 && end as usize > most && map.request(row).is_some() {
                return Err(outside("row_end", format_args!("at most {most}"), end, row));
            }
        }
    }
    Ok(())
}

/// Everything scoring reads through the map. Returns the longest row.
pub(super) fn keys(map: &KeyMap<'_>, count: usize) -> Result<usize> {
    rows(map, count, true)?;
    let longest = (0..count).map(|r| map.len(r)).max().unwrap_or(0);
    let Store::Paged { pages, page } = map.store else { return Ok(longest) };
    // Rows of one request mostly follow one another: look at each page once.
    let (mut seen, mut done) = (None, 0);
    for row in 0..count {
        let (len, table) = (map.len(row).div_ceil(page), map.table(row).unwrap_or(&[]));
        if seen != map.request(row) {
            (seen, done) = (map.request(row), 0);
        }
        for (i, &p) in table.iter().enumerate().take(len).skip(done) {
            if p < 0 || p as usize >= pages {
                let range = format_args!("pages of 0 to {}", pages as i64 - 1);
                return Err(outside("block_table", range, format_args!("{p} as page {i}"), row));
            }
        }
        done = done.max(len);
    }
    Ok(longest)
}

/// A column for each position of the longest row.
pub(super) fn columns(op: &IndexerLogits<'_>, longest: usize) -> Result<()> {
    if longest <= op.columns() {
        return Ok(());
    }
    let want = format_args!("a column for each of the longest row's {longest} positions");
    Err(Error::invalid("logits", want, op.columns()))
}

/// Slots to write to.
pub(super) fn slots(slots: &Slots<'_>, limit: usize) -> Result<()> {
    (0..slots.len()).try_for_each(|i| match slots.get(i) {
        s if s >= -1 && s < limit as i64 => Ok(()),
        s => Err(outside("slots", format_args!("-1 or a slot below {limit}"), s, i)),
    })
}

fn index(map: &KeyMap<'_>, row: usize, i: i32) -> Result<()> {
    let limit = map.slots();
    match (i, map.store) {
        (-1, _) => Ok(()),
        (..-1, _) => Err(outside("indices", "-1 or a position", i, row)),
        (0.., _) if map.request(row).is_none() => Ok(()),
        (0.., Store::Contiguous(_)) => {
            let slot = map.start(row) + i64::from(i);
            if slot < limit as i64 {
                return Ok(());
            }
            let range = format_args!("positions below {}", limit as i64 - map.start(row));
            Err(outside("indices", range, i, row))
        }
        (0.., Store::Paged { pages, page }) => {
            let table = map.table(row).unwrap_or(&[]);
            match table.get(i as usize / page) {
                Some(&p) if p >= 0 && (p as usize) < pages => Ok(()),
                Some(&p) => {
                    let range = format_args!("pages of 0 to {}", pages as i64 - 1);
                    let got = format_args!("{p} as page {} (index {i})", i as usize / page);
                    Err(outside("block_table", range, got, row))
                }
                None => {
                    let range = format_args!("positions below {}", table.len() * page);
                    Err(outside("indices", range, i, row))
                }
            }
        }
    }
}

/// Indices to translate.
pub(super) fn translation(op: &IndicesToSlots<'_>) -> Result<()> {
    let [count, _] = op.indices.shape();
    rows(&op.map, count, false)?;
    (0..count).try_for_each(|r| op.indices.row(&[r]).iter().try_for_each(|&i| index(&op.map, r, i)))
}

/// Indices to attend to.
pub(super) fn attention(op: &SparseAttention<'_>) -> Result<()> {
    if let Some(map) = &op.map {
        rows(map, op.rows, false)?;
    }
    let limit = op.page_shape[0].saturating_mul(op.page_shape[1]);
    for r in 0..op.rows {
        let row = op.indices.row(&[r]);
        let count = op.row_topk.map_or(op.topk as i64, |v| i64::from(v.row(&[])[r]));
        if count < 0 || count > op.topk as i64 {
            return Err(outside("row_topk", format_args!("0 to {}", op.topk), count, r));
        }
        let row = &row[..count as usize];
        match &op.map {
            Some(map) => row.iter().try_for_each(|&i| index(map, r, i))?,
            None => {
                if let Some(&i) = row.iter().find(|&&i| i < -1 || i64::from(i) >= limit as i64) {
                    let range = format_args!("-1 or a slot below {limit}");
                    return Err(outside("indices", range, i, r));
                }
            }
        }
    }
    Ok(())
}

/// Bounds, indices and columns of a distillation. What is not finite shows in its first pass, which writes nothing.
pub(super) fn distill(op: &Distill<'_>) -> Result<()> {
    let longest = keys(&op.map, op.rows)?;
    match (&op.indices, &op.target) {
        (Some(v), _) => (0..op.rows).try_for_each(|r| {
            let len = op.map.len(r);
            match v.row(&[r]).iter().find(|&&i| i < -1 || i64::from(i) >= len as i64) {
                Some(&i) => {
                    let range = format_args!("-1 or a position below {len}");
                    Err(outside("indices", range, i, r))
                }
                None => Ok(()),
            }
        }),
        (None, Target::Given(v)) if v.shape()[1] < longest => {
            let want = format_args!("a column for each of the longest row's {longest} positions");
            Err(Error::invalid("target", want, v.shape()[1]))
        }
        _ => Ok(()),
    }
}

/// Bounds of score rows.
pub(super) fn bounds(op: &TopK<'_>) -> Result<()> {
    let columns = op.logits.shape()[1];
    for (name, v) in [("row_start", op.row_start), ("row_end", op.row_end)] {
        for (row, &c) in v.iter().flat_map(|v| v.row(&[])).enumerate() {
            if c as i64 > columns as i64 || c < 0 && name == "row_start" {
                return Err(outside(name, format_args!("0 to {columns}"), c, row));
            }
        }
    }
    Ok(())
}

/// A row map ascends strictly below `rows`, then is -1.
pub(super) fn row_map(map: &[i32], rows: usize) -> Result<()> {
    let live = map.iter().position(|&v| v == -1).unwrap_or(map.len());
    let mut least = 0;
    for (i, &v) in map.iter().enumerate() {
        let ok = if i < live { v >= least && (v as usize) < rows } else { v == -1 };
        if !ok {
            return Err(Error::invalid(
                "from",
                format_args!("rows below {rows}, strictly ascending, then -1"),
                format_args!("{v} at position {i}"),
            ));
        }
        least = v.saturating_add(1);
    }
    Ok(())
}
