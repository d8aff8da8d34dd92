//! The measured times of a decoder's stages, and what they say about stages that were not measured.
//!
//! A call takes a latency and then goes at a rate. So between measured calls a time is linear in rows and, for select and
//! attend, in context. Where rows and contexts are not surrounded, it is linear in the roofline, operations or bytes, and
//! beyond goes on at the rate of the last two calls. For other dimensions it is in proportion to the roofline.

use super::shape::{Call, Ceilings, Layer, Shape, Stage, Work, layers};
use crate::Failure;
use indexcache::plan::{HfOptions, Plan};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// Whose kernels run. What is the same for both carries no name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum By {
    Public,
    Indexcache,
}

impl By {
    pub fn name(self) -> &'static str {
        match self {
            By::Public => "public",
            By::Indexcache => "indexcache",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// One request's rows, which end its context.
    Prefill,
    /// The next row of each request.
    Decode,
}

impl Phase {
    pub fn name(self) -> &'static str {
        match self {
            Phase::Prefill => "prefill",
            Phase::Decode => "decode",
        }
    }
}

/// The file.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Times {
    pub card: String,
    pub commit: String,
    #[serde(rename = "command")]
    _command: String,
    ceilings: Ceilings,
    /// Of the decoder that was timed, in Hugging Face's spelling.
    pub config: Map<String, Value>,
    times: Vec<Time>,
    #[serde(default)]
    pub arms: Vec<Arm>,
    #[serde(skip)]
    measured: Vec<Measured>,
}

/// One stage of one layer.
#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Time {
    stage: Stage,
    by: Option<By>,
    phase: Phase,
    /// Of the call; the requests, for the head.
    rows: f64,
    /// Rows of each request, in decode.
    queries: Option<f64>,
    context: Option<f64>,
    heads: Option<f64>,
    topk: Option<f64>,
    us: f64,
}

/// A whole prefill or decode step.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Arm {
    pub by: By,
    /// Of the layers that ran.
    pub pattern: String,
    pub phase: Phase,
    pub context: f64,
    pub rows: f64,
    /// Whether the step had an embedding and a head.
    #[serde(default = "yes")]
    pub head: bool,
    pub us: f64,
}

fn yes() -> bool {
    true
}

struct Measured {
    time: Time,
    call: Call,
    /// Of the decoder with this time's heads and top-k.
    shape: Shape,
    work: Work,
}

/// How a time is known, from best to worst.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum How {
    Measured,
    /// From measured calls of the same dimensions, smaller and larger ones.
    Interpolated,
    /// By operations or bytes, from other dimensions or beyond what was measured.
    Scaled,
}

/// A stage whose time is asked for.
#[derive(Clone, Copy)]
pub struct Question<'a> {
    pub stage: Stage,
    pub by: By,
    pub phase: Phase,
    pub shape: &'a Shape,
    pub layer: &'a Layer,
    pub call: Call,
}

impl Times {
    pub fn read(json: &[u8], name: &str) -> Result<Self, Failure> {
        let refuse = |why: String| Failure::Refused(format!("{name}: {why}"));
        let mut file: Times = serde_json::from_slice(json).map_err(|e| refuse(e.to_string()))?;
        if !file.ceilings.are_positive() {
            return Err(refuse("ceilings must be above 0".into()));
        }
        let config = Value::Object(file.config.clone()).to_string().into_bytes();
        let plan = Plan::from_hf_config_with(&config, &HfOptions::default())?;
        let shape = Shape::new(&file.config, plan.model(), 1.0)?;
        if layers(&plan, &file.config)?.iter().any(|layer| !layer.is_plain()) {
            return Err(refuse("config: layers must all attend sparsely, without pools".into()));
        }
        for (number, time) in file.times.iter().enumerate() {
            let measured = time.measured(&shape);
            let measured = measured.map_err(|why| refuse(format!("times[{number}]: {why}")))?;
            if file.measured.iter().any(|m| m.same_as(&measured)) {
                return Err(refuse(format!("times[{number}]: this call is there already")));
            }
            file.measured.push(measured);
        }
        Ok(file)
    }

    /// Whether these kernels were timed.
    pub fn has(&self, by: By) -> bool {
        self.measured.iter().any(|m| m.time.stage == Stage::Select && m.time.by == Some(by))
    }

    /// Microseconds, and how they are known.
    pub fn of(&self, ask: &Question<'_>) -> Result<(f64, How), Failure> {
        let Question { stage, by, phase, .. } = *ask;
        let here = |m: &&Measured| {
            m.time.stage == stage && m.time.phase == phase && m.time.by.is_none_or(|b| b == by)
        };
        let measured = ask.nearest(self.measured.iter().filter(here).collect());
        let Some(first) = measured.first() else {
            let by = if stage.has_kernels() { format!(" by {}", by.name()) } else { String::new() };
            let why = format!("no time of {}{by} in {}", stage.name(), phase.name());
            return Err(Failure::Refused(why));
        };
        // The same dimensions have the same work.
        let same = ask.shape.work(stage, ask.layer, first.call) == first.work
            && ask.queries(first.call) == ask.queries(ask.call);
        let (us, how, theirs) = self.as_measured(ask, &measured, &first.shape);
        let ours = self.ceilings.microseconds(ask.shape.work(stage, ask.layer, ask.call));
        Ok((us * ours / theirs, if same { how } else { How::Scaled }))
    }

    /// What the decoder of `shape`, which was timed, takes for as many rows over as long a cache; its roofline there.
    fn as_measured(
        &self,
        ask: &Question<'_>,
        measured: &[&Measured],
        shape: &Shape,
    ) -> (f64, How, f64) {
        let Question { stage, phase, layer, call, .. } = *ask;
        // The head has one row of each request.
        let one_request = phase == Phase::Prefill && stage != Stage::Head;
        // No shorter than a request's rows, though a pool may be.
        let length = |rows: f64| {
            let least = if one_request { rows } else { call.queries };
            let seen = layer.length(stage, call.context);
            if stage.over_context() { seen.max(least) } else { least }
        };
        let roofline = |rows: f64, context: f64| {
            let call = match one_request {
                true => Call { requests: 1.0, queries: rows, context },
                false => Call { requests: rows / call.queries, context, ..call },
            };
            self.ceilings.microseconds(shape.work(stage, &Layer::PLAIN, call))
        };
        let mut all_rows: Vec<f64> = measured.iter().map(|m| m.call.rows()).collect();
        all_rows.sort_by(f64::total_cmp);
        all_rows.dedup();
        let over_contexts = all_rows.iter().filter_map(|&rows| {
            let these = measured.iter().filter(|m| m.call.rows() == rows);
            let mut points: Vec<_> =
                these.map(|m| (m.call.context, m.time.us, How::Measured)).collect();
            points.sort_by(|a, b| a.0.total_cmp(&b.0));
            let (us, how) = on_line(&points, length(rows))?;
            Some((rows, us, how))
        });
        let (rows, over_contexts) = (call.rows(), over_contexts.collect::<Vec<_>>());
        let here = roofline(rows, length(rows));
        if let Some((us, how)) = on_line(&over_contexts, rows) {
            return (us, how, here);
        }
        // Of calls with as much to do, the most alike.
        let unlike = |m: &Measured| {
            (m.call.rows() / rows).ln().abs() + (m.call.context / length(rows)).ln().abs()
        };
        let point = |m: &&Measured| (self.ceilings.microseconds(m.work), m.time.us, unlike(m));
        let mut points: Vec<_> = measured.iter().map(point).collect();
        points.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.2.total_cmp(&b.2)));
        points.dedup_by(|b, a| is(b.0, a.0));
        let points: Vec<_> = points.iter().map(|p| (p.0, p.1, How::Interpolated)).collect();
        match on_line(&points, here) {
            Some((us, how)) => (us, how, here),
            None => (beyond(&points, here), How::Scaled, here),
        }
    }
}

impl Question<'_> {
    /// Rows of a request, where they are not what a time is interpolated over.
    fn queries(&self, call: Call) -> f64 {
        match self.phase {
            Phase::Prefill => 1.0,
            Phase::Decode => call.queries,
        }
    }

    /// Those whose heads, top-k and queries a row differ least from what is asked for; all, where none has such.
    fn nearest<'a>(&self, measured: Vec<&'a Measured>) -> Vec<&'a Measured> {
        if !self.stage.over_context() {
            return measured;
        }
        let heads = |shape: &Shape| match self.stage {
            Stage::Select => shape.index_heads,
            _ => shape.attention.heads,
        };
        let far = |m: &Measured| {
            let apart = |a: f64, b: f64| (a / b).ln().abs();
            apart(heads(&m.shape), heads(self.shape))
                + apart(m.shape.topk, self.shape.topk)
                + apart(self.queries(m.call), self.queries(self.call))
        };
        let least = measured.iter().map(|m| far(m)).fold(f64::INFINITY, f64::min);
        let mut near: Vec<&Measured> = measured.into_iter().filter(|m| far(m) == least).collect();
        // Two shapes may be as far, one on each side: the smaller.
        if let Some(smaller) = near.iter().map(|m| heads(&m.shape)).min_by(f64::total_cmp) {
            near.retain(|m| heads(&m.shape) == smaller);
        }
        near
    }
}

/// The same but for rounding.
fn is(a: f64, b: f64) -> bool {
    (a - b).abs() <= 1e-9 * b
}

/// The time at `x`, if that is within ascending points `(x, time, how it is known)`: on straight lines between them.
fn on_line(points: &[(f64, f64, How)], x: f64) -> Option<(f64, How)> {
    if let Some(&(_, us, how)) = points.iter().find(|p| is(p.0, x)) {
        return Some((us, how));
    }
    let above = points.partition_point(|p| p.0 < x);
    let (a, b) = (points.get(above.checked_sub(1)?)?, points.get(above)?);
    let part = (x - a.0) / (b.0 - a.0);
    Some((a.1 + (b.1 - a.1) * part, a.2.max(b.2).max(How::Interpolated)))
}

/// The time at the roofline `x`, which is not within these.
fn beyond(points: &[(f64, f64, How)], x: f64) -> f64 {
    let ends = match points {
        [] => return f64::NAN,
        [one] => (one, None),
        [first, second, ..] if x < first.0 => (first, Some(second)),
        [.., second, last] => (last, Some(second)),
    };
    let (end, next) = ends;
    // Neither faster than the roofline nor, latency and all, in more than proportion.
    let most = end.1 / end.0;
    let rate = next.map_or(most, |next| (end.1 - next.1) / (end.0 - next.0));
    end.1 + rate.clamp(most.min(1.0), most) * (x - end.0)
}

impl Time {
    fn measured(&self, decoder: &Shape) -> Result<Measured, String> {
        let over_context = self.stage.over_context();
        match self.by {
            None if over_context => return Err(format!("by is missing: {}", self.stage.name())),
            Some(_) if !self.stage.has_kernels() => {
                return Err(format!("by must not be there: {}", self.stage.name()));
            }
            _ => {}
        }
        if !decoder.has(self.stage) {
            return Err(format!("config has no {}", self.stage.name()));
        }
        let mut shape = decoder.clone();
        match (self.heads, self.topk, self.context) {
            (Some(heads), Some(topk), Some(_)) if over_context => {
                match self.stage {
                    Stage::Select => shape.index_heads = heads,
                    _ => shape.attention.heads = heads,
                }
                shape.topk = topk;
            }
            (None, None, None) if !over_context => {}
            _ if over_context => return Err("context, heads and topk must be there".into()),
            _ => return Err("context, heads and topk must not be there".into()),
        }
        let queries = self.queries.unwrap_or(1.0);
        let (requests, queries) = match self.phase {
            _ if self.stage == Stage::Head => (self.rows, 1.0),
            Phase::Prefill => (1.0, self.rows),
            Phase::Decode => (self.rows / queries, queries),
        };
        // Where the context does not matter, it is as long as its rows.
        let context = self.context.unwrap_or(queries);
        let positive = [requests, queries, shape.topk, self.us, shape.index_heads];
        let positive = positive.iter().chain([&shape.attention.heads]);
        if !positive.into_iter().all(|x| x.is_finite() && *x > 0.0) || context < queries {
            return Err("sizes and times must be above 0, and rows within the context".into());
        }
        let call = Call { requests, queries, context };
        let work = shape.work(self.stage, &Layer::PLAIN, call);
        Ok(Measured { time: self.clone(), call, shape, work })
    }
}

impl Measured {
    fn same_as(&self, other: &Self) -> bool {
        let what = |m: &Self| (m.time.stage, m.time.by, m.time.phase);
        let sizes = |m: &Self| {
            let (call, shape) = (m.call, &m.shape);
            [
                call.requests,
                call.queries,
                call.context,
                shape.index_heads,
                shape.attention.heads,
                shape.topk,
            ]
        };
        what(self) == what(other) && sizes(self) == sizes(other)
    }
}
