//! What a whole prefill or decode step takes: the sum of its stages' times over layers, and over chunks.

use super::shape::{Call, Layer, Shape, Stage, layers, missing};
use super::times::{By, How, Phase, Question, Times};
use crate::Failure;
use indexcache::plan::{HfOptions, Plan, Role, Spelling};
use serde::Serialize;
use serde_json::{Map, Value};

/// Rows of a prefill chunk.
pub const CHUNK: f64 = 8192.0;

/// A decoder to be simulated: its config, and how many GPUs divide it.
pub struct Decoder {
    json: Vec<u8>,
    fields: Map<String, Value>,
    tp: f64,
}

/// It with one pattern.
pub struct Patterned {
    pub plan: Plan,
    shape: Shape,
    /// Those that do the same, and how many they are.
    layers: Vec<(Layer, f64)>,
    /// Whether a step ends in a head.
    pub head: bool,
}

/// A stage's time over all layers, in microseconds, by how it is known.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Spent {
    pub stage: Stage,
    pub us: f64,
    pub measured_us: f64,
    pub interpolated_us: f64,
    pub scaled_us: f64,
}

impl Spent {
    fn new(stage: Stage) -> Self {
        Spent { stage, us: 0.0, measured_us: 0.0, interpolated_us: 0.0, scaled_us: 0.0 }
    }

    fn add(&mut self, us: f64, how: How) {
        self.us += us;
        *match how {
            How::Measured => &mut self.measured_us,
            How::Interpolated => &mut self.interpolated_us,
            How::Scaled => &mut self.scaled_us,
        } += us;
    }
}

/// What a phase takes.
#[derive(Debug, Serialize)]
pub struct Estimate {
    pub us: f64,
    /// Those that take any time.
    pub stages: Vec<Spent>,
}

impl Decoder {
    pub fn new(json: Vec<u8>, tp: u32) -> Result<Self, Failure> {
        let fields = Plan::hf_fields(&json)?;
        Ok(Decoder { json, fields, tp: f64::from(tp) })
    }

    pub fn fields(&self) -> &Map<String, Value> {
        &self.fields
    }

    /// With the config's pattern, or with another.
    pub fn with(&self, pattern: Option<&str>) -> Result<Patterned, Failure> {
        let pattern = pattern.map(Spelling::Letters);
        let options = HfOptions { pattern, ..HfOptions::default() };
        let plan = Plan::from_hf_config_with(&self.json, &options)?;
        let shape = Shape::new(&self.fields, plan.model(), self.tp)?;
        let mut kinds: Vec<(Layer, f64)> = vec![];
        for layer in layers(&plan, &self.fields)? {
            if layer.dense && !shape.has(Stage::DenseMlp) {
                return Err(missing("intermediate_size"));
            }
            match kinds.iter_mut().find(|(kind, _)| *kind == layer) {
                Some((_, count)) => *count += 1.0,
                None => kinds.push((layer, 1.0)),
            }
        }
        Ok(Patterned { plan, shape, layers: kinds, head: true })
    }

    /// Plain DSA.
    pub fn all_full(&self, plan: &Plan) -> Result<Patterned, Failure> {
        let indexers = plan.roles().iter().filter(|role| **role != Role::None).count();
        self.with(Some(&"F".repeat(indexers)))
    }
}

impl Patterned {
    /// Of a prompt of `context` rows in chunks, or of one step of so many requests.
    pub fn estimate(
        &self,
        times: &Times,
        by: By,
        phase: Phase,
        context: f64,
        requests: f64,
    ) -> Result<Estimate, Failure> {
        let calls: Vec<Call> = match phase {
            Phase::Decode => vec![Call { requests, queries: 1.0, context }],
            Phase::Prefill => {
                let chunk = |n: f64| {
                    let end = ((n + 1.0) * CHUNK).min(context);
                    Call { requests: 1.0, queries: end - n * CHUNK, context: end }
                };
                (0..(context / CHUNK).ceil() as u32).map(|n| chunk(f64::from(n))).collect()
            }
        };
        let mut stages = Stage::ALL.map(Spent::new);
        for spent in &mut stages {
            let stage = spent.stage;
            let mut add = |call, layer, count| -> Result<(), Failure> {
                let question = Question { stage, by, phase, shape: &self.shape, layer, call };
                let (us, how) = times.of(&question)?;
                spent.add(us * count, how);
                Ok(())
            };
            if stage == Stage::Head {
                // The last row of each request, once.
                let call = Call { requests, queries: 1.0, context };
                if self.head {
                    add(call, &Layer::PLAIN, 1.0)?;
                }
                continue;
            }
            for (layer, count) in self.layers.iter().filter(|(layer, _)| layer.has(stage)) {
                for call in &calls {
                    add(*call, layer, *count)?;
                }
            }
        }
        let stages: Vec<Spent> = stages.into_iter().filter(|spent| spent.us > 0.0).collect();
        Ok(Estimate { us: stages.iter().map(|spent| spent.us).sum(), stages })
    }
}
