//! Pipeline stages: a range of layers, and the indices that cross its ends.

use super::{Plan, Role};
use crate::error::{Error, Result};
use std::ops::Range;

/// Indices that cross a stage boundary: int32 rows of `row_bytes` each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Handoff {
    /// The Full layer that selected them, on whichever stage it is.
    pub source: u32,
    /// Bytes for one row (token) of the step.
    pub row_bytes: u64,
}

impl Plan {
    /// Layers `first..last` as a pipeline stage of their own.
    ///
    /// With `promote`, a stage that would start on a Shared layer runs that layer as Full instead of receiving
    /// indices. All stages must be cut the same way: a promoting stage also expects the next one to promote.
    pub fn slice(&self, first: u32, last: u32, promote: bool) -> Result<Self> {
        let Range { start, end } = self.stage;
        if !(start <= first && first < last && last <= end) {
            return Err(Error::invalid(
                "stage",
                format!("a range that is not empty within {start}..{end}"),
                format!("{first}..{last}"),
            ));
        }
        let mut part = self.clone();
        part.stage = first..last;
        part.promoted = self.promoted.filter(|l| part.stage.contains(l));
        if promote {
            part.promotes = true;
            for boundary in [first, last] {
                part.promote(boundary);
            }
        }
        part.derive()?;
        Ok(part)
    }

    /// Lets the first sparse layer after `boundary` select for itself.
    fn promote(&mut self, boundary: u32) {
        let Some(layer) = self.first_sparse(boundary) else { return };
        match self.roles.get_mut(layer as usize) {
            Some(role) if *role == Role::Shared => *role = Role::Full,
            _ => return,
        }
        if self.stage.contains(&layer) {
            self.promoted = Some(layer);
            self.notes.push(format!(
                "layer {layer} is Shared in the model and promoted to Full on this stage; its indexer weights must exist (checkpoints trained with sharing ship none)"
            ));
        }
    }

    /// First decoder layer with sparse attention at or after `layer`, on this stage or a later one.
    fn first_sparse(&self, layer: u32) -> Option<u32> {
        (layer..self.decoder_layers).find(|l| self.roles.get(*l as usize) != Some(&Role::None))
    }

    /// The indices that cross the boundary before layer `boundary`. A function of the boundary alone, so both
    /// ends of it agree, and a stage between source and reader receives what it only sends on.
    fn crossing(&self, boundary: u32) -> Option<Handoff> {
        let reader = self.layers.get(self.first_sparse(boundary)? as usize)?;
        let source = reader.source.filter(|_| reader.role == Role::Shared)?;
        Some(Handoff { source, row_bytes: self.row_bytes() })
    }

    /// The indices this stage must have received before its first sparse layer runs.
    pub fn receive(&self) -> Option<Handoff> {
        self.crossing(self.stage.start)
    }

    /// The indices this stage must send on: its own, or those it received.
    pub fn send(&self) -> Option<Handoff> {
        self.crossing(self.stage.end)
    }

    /// The Shared layer that this stage runs as Full because it was sliced with `promote`.
    pub fn promoted(&self) -> Option<u32> {
        self.promoted
    }
}
