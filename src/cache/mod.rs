//! The index cache: what a Full layer selected, kept for the Shared layers after it.
//!
//! One int32 `[rows, topk]` buffer a lane: layers run in order, so only the newest Full layer's indices are ever
//! needed. The lane remembers whose they are, and hands them out only to a layer that may have them.

use crate::context::{Context, Memory, Stream};
use crate::error::{Error, Result, Status};
use crate::layout::Workspace;
use crate::ops::{IndexForm, IndexerArgs};
use crate::plan::{Plan, Role};
use crate::tensor::{DType, Tensor};
use std::cell::Cell;
use std::sync::Arc;

/// Buffers and state of all lanes. Used by one thread at a time.
pub struct Cache {
    context: Arc<Context>,
    plan: Arc<Plan>,
    lanes: Vec<Lane>,
    max_rows: usize,
    topk: usize,
    /// Elements between rows.
    row_stride: usize,
    /// Memory of the library's own, if the host gave none.
    _owned: Option<Memory>,
}

// SAFETY: lane pointers are to `_owned` or to the host's buffer, which `Cache::new`'s contract dedicates to the cache.
unsafe impl Send for Cache {}

struct Lane {
    data: *mut i32,
    /// Shape and strides as C wants them, at an address that stays.
    extents: Box<Extents>,
    step: Cell<Option<Step>>,
}

/// Shape and strides of a lane's tensor in DLPack's types.
#[derive(Clone, Copy, Debug, Default)]
pub struct Extents {
    /// `[rows, topk]`.
    pub shape: [i64; 2],
    /// `[row stride, 1]`.
    pub strides: [i64; 2],
}

#[derive(Clone, Copy)]
struct Step {
    id: u64,
    rows: usize,
    written: Option<Written>,
    /// The indices come from the draft iteration before.
    carried: bool,
}

/// Whose indices a lane holds, and what they mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Written {
    /// The Full layer that selected them.
    pub layer: u32,
    /// Logical or slots.
    pub form: IndexForm,
    /// The host's number of the block table, for slots; 0 if not tracked.
    pub table_id: u64,
}

/// A lane's state, for inspection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LaneState {
    /// Rows of the step.
    pub rows: usize,
    /// The step's id.
    pub step_id: u64,
    /// Whose indices the lane holds.
    pub written: Option<Written>,
}

/// How many lanes of how many rows.
#[derive(Clone, Copy, Debug)]
pub struct CacheShape {
    /// Independent copies: micro-batches, or target and draft model.
    pub lanes: usize,
    /// Largest number of rows a step.
    pub max_rows: usize,
}

impl CacheShape {
    /// Elements of the whole buffer, `[lanes, max_rows, topk]`.
    fn elements(self, topk: usize) -> Result<usize> {
        if !(1..=4096).contains(&self.lanes) {
            return Err(Error::invalid("lanes", "1 to 4096", self.lanes));
        }
        if !(1..=i32::MAX as usize).contains(&self.max_rows) {
            return Err(Error::invalid(
                "max_rows",
                format_args!("1 to {}", i32::MAX),
                self.max_rows,
            ));
        }
        self.lanes
            .checked_mul(self.max_rows)
            .and_then(|n| n.checked_mul(topk))
            .filter(|&n| n <= isize::MAX as usize / 4)
            .ok_or_else(|| {
                Error::invalid("max_rows", "a size that fits the address space", self.max_rows)
            })
    }

    /// Bytes that [`Cache::new`] allocates when the host gives no buffer.
    pub fn bytes(self, plan: &Plan) -> Result<usize> {
        Ok(self.elements(plan.model().row_width() as usize)? * size_of::<i32>())
    }
}

impl Cache {
    /// Makes a cache over `buffer`, int32 `[lanes, max_rows, topk]` of the host, or over memory of its own.
    ///
    /// # Safety
    /// `buffer` must stay valid, and be written by nobody else except between [`Cache::slot`] and
    /// [`Cache::publish`], until the cache is dropped.
    pub unsafe fn new(
        context: Arc<Context>,
        plan: Arc<Plan>,
        shape: CacheShape,
        buffer: Option<Tensor<'_>>,
    ) -> Result<Self> {
        let topk = plan.model().row_width() as usize;
        let elements = shape.elements(topk)?;
        let mut owned = None;
        let (data, lane_stride, row_stride) = match buffer {
            Some(b) => {
                b.require_device(context.device())?;
                b.require_shape(&[Some(shape.lanes), Some(shape.max_rows), Some(topk)])?;
                let view = b.view_mut::<i32, 3>()?;
                let [lane, row, _] = view.strides();
                (view.as_mut_ptr(), lane, row)
            }
            None => {
                let mut memory = context.allocate(elements)?;
                let data = memory.as_mut_ptr();
                owned = Some(memory);
                (data, shape.max_rows * topk, topk)
            }
        };
        let lanes = (0..shape.lanes)
            // In bounds: `lane` is below the buffer's first extent.
            .map(|lane| Lane {
                data: data.wrapping_add(lane * lane_stride),
                extents: Box::new(Extents {
                    shape: [0, topk as i64],
                    strides: [row_stride as i64, 1],
                }),
                step: Cell::new(None),
            })
            .collect();
        Ok(Self { context, plan, lanes, max_rows: shape.max_rows, topk, row_stride, _owned: owned })
    }

    /// The plan the cache follows.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The context the cache runs on.
    pub fn context(&self) -> &Context {
        &self.context
    }

    fn lane(&self, lane: usize) -> Result<&Lane> {
        let n = self.lanes.len();
        self.lanes
            .get(lane)
            .ok_or_else(|| Error::invalid("lane", format_args!("0 to {}", n - 1), lane))
    }

    fn lane_mut(&mut self, lane: usize) -> Result<&mut Lane> {
        let n = self.lanes.len();
        self.lanes
            .get_mut(lane)
            .ok_or_else(|| Error::invalid("lane", format_args!("0 to {}", n - 1), lane))
    }

    fn step(&self, lane: usize) -> Result<Step> {
        self.lane(lane)?.step.get().ok_or_else(|| {
            Error::new(
                Status::Stale,
                format!("lane {lane}: no step has begun; call idxc_step_begin first"),
            )
        })
    }

    /// Begins a forward pass over `rows` rows. Whatever the lane held is stale from here on.
    pub fn step_begin(&mut self, lane: usize, rows: usize, step_id: u64) -> Result<()> {
        let max_rows = self.max_rows;
        let lane_ref = self.lane_mut(lane)?;
        if rows > max_rows {
            return Err(Error::invalid(
                "rows",
                format_args!("at most max_rows = {max_rows}"),
                rows,
            ));
        }
        lane_ref.check_new_step(lane, step_id)?;
        lane_ref.begin(Step { id: step_id, rows, written: None, carried: false });
        Ok(())
    }

    /// Begins the next draft iteration with the indices of the one before: row `i` takes old row `from[i]`. `from`
    /// (int32 `[rows]`) ascends strictly, with a -1 tail for padding rows. Only for plans whose MTP layers share.
    pub fn step_carry(
        &mut self,
        lane: usize,
        from: Tensor<'_>,
        step_id: u64,
        stream: Stream,
    ) -> Result<()> {
        let step = self.step(lane)?;
        let written = step.written.ok_or_else(|| {
            Error::new(
                Status::Stale,
                format!("lane {lane}: step {} wrote no indices that could be carried on", step.id),
            )
        })?;
        if !self.plan.mtp_shares() || written.layer < self.plan.decoder_layers() {
            return Err(Error::new(
                Status::Invalid,
                format!(
                    "lane {lane}: only the indices of an MTP layer of a plan with index_share_for_mtp_iteration may be \
                     carried into another step; this lane holds layer {}'s",
                    written.layer
                ),
            ));
        }
        from.require_device(self.context.device())?;
        let map = from.view::<i32, 1>()?;
        let rows = map.shape()[0];
        if rows > self.max_rows {
            let want = format_args!("at most max_rows = {} rows", self.max_rows);
            return Err(Error::invalid("from", want, rows));
        }
        self.lane(lane)?.check_new_step(lane, step_id)?;

        self.lane(lane)?.step.set(None); // Half-moved rows are nobody's.
        let data = self.tensor(lane, self.max_rows)?.view_mut::<i32, 2>()?;
        if let Err(e) = self.context.carry_rows(&data, &map, step.rows, stream) {
            self.lane(lane)?.step.set(Some(step)); // Refused before anything was moved.
            return Err(e);
        }
        let target = self.lane_mut(lane)?;
        target.begin(Step { id: step_id, rows, written: Some(written), carried: true });
        Ok(())
    }

    /// Runs the indexer's selection for a layer: on a Full layer writes the lane's indices, on a Shared layer only
    /// checks that those it will reuse are there (`args` is not asked for).
    pub fn select<'a>(
        &mut self,
        lane: usize,
        layer: u32,
        args: impl FnOnce() -> Result<IndexerArgs<'a>>,
        workspace: Workspace<'_>,
        stream: Stream,
    ) -> Result<()> {
        if !self.must_select(lane, layer)? {
            return Ok(());
        }
        self.require_kind(layer, false)?;
        let args = args()?;
        let step = self.step(lane)?;
        let rows = args.q.shape().first().copied().unwrap_or(0);
        if rows != step.rows {
            return Err(Error::invalid(
                "q",
                format_args!("{} rows, as the step has", step.rows),
                rows,
            ));
        }
        let op = args.check_select(self.tensor(lane, rows)?)?;
        // Until the new indices are whole, the lane holds none.
        self.set_written(lane, None)?;
        match self.context.select(&op, workspace, stream) {
            Ok(()) => self
                .set_written(lane, Some(Written { layer, form: IndexForm::Logical, table_id: 0 })),
            Err(e) => {
                // Refused before anything was written.
                self.set_written(lane, step.written)?;
                Err(e)
            }
        }
    }

    /// Bytes of workspace that [`Cache::select`] needs for these shapes.
    pub fn select_workspace(&self, args: IndexerArgs<'_>) -> Result<usize> {
        let rows = args.q.shape().first().copied().unwrap_or(0);
        let op = args.check_select(self.rows(rows)?)?;
        Ok(self.context.select_workspace(&op))
    }

    /// Whether `select` has work to do on this layer. An error if the layer has no sparse attention, or would reuse
    /// what is not there.
    fn must_select(&self, lane: usize, layer: u32) -> Result<bool> {
        match self.role(layer)? {
            Role::Full => {
                let step = self.step(lane)?;
                Ok(!(step.carried && step.written.is_some_and(|w| w.layer == layer)))
            }
            Role::Shared => self.written(lane, layer).map(|_| false),
            Role::None => Err(no_sparse_attention(layer)),
        }
    }

    /// Refuses a layer whose selection is of another kind than the operations': those select single rows of index K, one
    /// set for all heads, and attend to the KV rows of the same numbers.
    fn require_kind(&self, layer: u32, attend: bool) -> Result<()> {
        let (l, sets) = (self.plan.layer(layer)?, self.plan.model().selections);
        let same = l.block == l.key_pool || (attend && l.block == 1);
        if same && sets == 1 {
            return Ok(());
        }
        Err(Error::new(
            Status::Unsupported,
            format!(
                "layer {layer} selects {sets} set(s) of blocks of {} token(s) by index K that stands for {} token(s) a row, \
                 which this library cannot do: use the host's own kernels, with idxc_publish and idxc_indices",
                l.block, l.key_pool
            ),
        ))
    }

    /// What the host has to do itself on some layer, if there is such a layer: to be said before the first step.
    pub fn unsupported(&self) -> Option<Error> {
        let sparse = |&l: &u32| self.role(l).is_ok_and(|r| r == Role::Full);
        self.plan.stage().filter(sparse).find_map(|l| self.require_kind(l, false).err())
    }

    fn role(&self, layer: u32) -> Result<Role> {
        self.plan.role(layer)
    }

    /// Whose indices `layer` may read now.
    fn written(&self, lane: usize, layer: u32) -> Result<(Step, Written)> {
        if self.role(layer)? == Role::None {
            return Err(no_sparse_attention(layer));
        }
        let step = self.step(lane)?;
        let source = self.plan.source(layer)?;
        match step.written {
            Some(w) if Some(w.layer) == source => Ok((step, w)),
            other => Err(Error::new(
                Status::Stale,
                format!(
                    "layer {layer} uses the indices of layer {}, but lane {lane} holds {} in step {}",
                    source.map_or("none".into(), |s| s.to_string()),
                    other.map_or("none".into(), |w| format!("those of layer {}", w.layer)),
                    step.id
                ),
            )),
        }
    }

    /// The indices that `layer` uses, its own or reused, with what they mean.
    pub fn indices(&self, lane: usize, layer: u32) -> Result<(Tensor<'_>, Written)> {
        let (step, written) = self.written(lane, layer)?;
        Ok((self.tensor(lane, step.rows)?, written))
    }

    /// The lane's buffer for this step, to be written by the host before [`Cache::publish`].
    pub fn slot(&self, lane: usize) -> Result<Tensor<'_>> {
        let step = self.step(lane)?;
        self.tensor(lane, step.rows)
    }

    /// DLPack extents of the lane's tensor, at an address that stays until the next step.
    pub fn extents(&self, lane: usize) -> Result<&Extents> {
        Ok(&self.lane(lane)?.extents)
    }

    /// Takes indices that somebody else computed: the host's own indexer, or the stage before. `indices` may be the
    /// lane's own buffer (see [`Cache::slot`]), or absent, which means the same; otherwise it is copied.
    pub fn publish(
        &mut self,
        lane: usize,
        layer: u32,
        indices: Option<Tensor<'_>>,
        form: IndexForm,
        table_id: u64,
        stream: Stream,
    ) -> Result<()> {
        let step = self.step(lane)?;
        if self.plan.receive().map(|h| h.source) != Some(layer) {
            match self.role(layer)? {
                Role::Full => {}
                Role::Shared => {
                    return Err(Error::invalid(
                        "layer",
                        "a Full layer, or the Full layer of an earlier stage whose indices this stage receives",
                        format_args!("layer {layer}, which is Shared"),
                    ));
                }
                Role::None => return Err(no_sparse_attention(layer)),
            }
        }
        if form == IndexForm::Logical && table_id != 0 {
            return Err(Error::invalid("table_id", "0 for logical indices", table_id));
        }
        let slot = self.tensor(lane, step.rows)?;
        if let Some(given) = indices {
            given.require_device(self.context.device())?;
            given.require_shape(&[Some(step.rows), Some(self.topk)])?;
            let from = given.view::<i32, 2>()?;
            let to = slot.view_mut::<i32, 2>()?;
            if from.as_ptr() != to.as_mut_ptr().cast_const() {
                if overlaps(&given, &slot) {
                    return Err(Error::invalid(
                        "indices",
                        "the lane's own buffer or one apart from it",
                        "an overlap",
                    ));
                }
                self.set_written(lane, None)?;
                self.context.copy_rows(&from, &to, stream)?;
            } else if step.rows > 1 && from.strides() != to.strides() {
                return Err(Error::invalid(
                    "indices",
                    format_args!("the lane's strides {:?}", to.strides()),
                    format_args!("{:?}", from.strides()),
                ));
            }
        }
        self.set_written(lane, Some(Written { layer, form, table_id }))
    }

    /// Copies the indices that `layer` uses to `out`, int32 `[rows, topk]`, for the stage after.
    pub fn export(&self, lane: usize, layer: u32, out: Tensor<'_>, stream: Stream) -> Result<()> {
        let (from, _) = self.indices(lane, layer)?;
        out.require_device(self.context.device())?;
        out.require_shape(&[Some(from.shape()[0]), Some(self.topk)])?;
        if overlaps(&from, &out) {
            return Err(Error::invalid("out", "memory apart from the cache", "an overlap"));
        }
        let from = from.view::<i32, 2>()?;
        let to = out.view_mut::<i32, 2>()?;
        self.context.copy_rows(&from, &to, stream)
    }

    /// The indices that `layer` attends to, and their form. `table_id` names the block table in force; slots that
    /// were translated with another are refused.
    pub fn indices_under(
        &self,
        lane: usize,
        layer: u32,
        table_id: u64,
    ) -> Result<(Tensor<'_>, IndexForm)> {
        let (indices, written) = self.indices(lane, layer)?;
        self.require_kind(layer, true)?;
        if written.form == IndexForm::Slots && written.table_id != table_id {
            return Err(Error::new(
                Status::Form,
                format!(
                    "table_id: lane {lane} holds slots under block table {}, this call uses {table_id}; publish the \
                     logical indices, or translate them again",
                    written.table_id
                ),
            ));
        }
        Ok((indices, written.form))
    }

    /// What the lane holds.
    pub fn state(&self, lane: usize) -> Result<LaneState> {
        let step = self.step(lane)?;
        Ok(LaneState { rows: step.rows, step_id: step.id, written: step.written })
    }

    /// Indices of `rows` rows, for size queries.
    pub fn rows(&self, rows: usize) -> Result<Tensor<'_>> {
        if rows > self.max_rows {
            return Err(Error::invalid(
                "q",
                format_args!("at most max_rows = {} rows", self.max_rows),
                rows,
            ));
        }
        self.tensor(0, rows)
    }

    /// The first `rows` rows of the lane's buffer.
    fn tensor(&self, lane: usize, rows: usize) -> Result<Tensor<'_>> {
        let lane = self.lane(lane)?;
        // SAFETY: the lane has `max_rows >= rows` rows of `topk` at this stride, in memory that lives as long as the
        // cache; the cache alone writes it, under `&mut self`.
        unsafe {
            Tensor::from_raw_parts(
                "indices",
                lane.data.cast(),
                self.context.device(),
                DType::I32,
                &[rows.min(self.max_rows), self.topk],
                &[self.row_stride, 1],
            )
        }
    }

    fn set_written(&self, lane: usize, written: Option<Written>) -> Result<()> {
        let step = self.step(lane)?;
        self.lane(lane)?.step.set(Some(Step { written, carried: false, ..step }));
        Ok(())
    }
}

impl Lane {
    fn check_new_step(&self, lane: usize, step_id: u64) -> Result<()> {
        match self.step.get() {
            Some(s) if s.id == step_id => Err(Error::invalid(
                "step_id",
                "a number other than the lane's current step",
                format_args!("{step_id}, which lane {lane} has already begun"),
            )),
            _ => Ok(()),
        }
    }

    fn begin(&mut self, step: Step) {
        self.extents.shape[0] = step.rows as i64;
        self.step.set(Some(step));
    }
}

fn no_sparse_attention(layer: u32) -> Error {
    Error::invalid(
        "layer",
        "a layer with sparse attention",
        format_args!("layer {layer}, whose role is None"),
    )
}

/// Whether two tensors' extents share bytes.
fn overlaps(a: &Tensor<'_>, b: &Tensor<'_>) -> bool {
    let range = |t: &Tensor<'_>| {
        let last: usize =
            t.shape().iter().zip(t.strides()).map(|(&n, &s)| n.saturating_sub(1) * s).sum();
        let start = t.as_ptr().addr();
        let empty = t.shape().contains(&0);
        start..if empty { start } else { start + (last + 1) * t.dtype().size() }
    };
    let (a, b) = (range(a), range(b));
    a.start < b.end && b.start < a.end
}
