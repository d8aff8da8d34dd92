//! Greedy search for the layers that keep their indexer, by loss and without training.
//!
//! It starts with every layer Full. Each step turns Shared the one layer whose turn gives the lowest mean loss on a
//! fixed calibration set, ties to the lowest layer. Patterns are nested, so one search serves every retention.
//!
//! The host keeps its model and its loop: it asks for a pattern, measures its loss, and tells it.
//!
//! ```
//! use indexcache::search::{Calibration, Search, Spec};
//!
//! # fn evaluate(pattern: &indexcache::plan::Pattern) -> f64 {
//! #     (0..).zip(pattern.to_string().chars()).map(|(l, c)| if c == 'S' { f64::from(l) } else { 0.0 }).sum()
//! # }
//! # fn main() -> indexcache::error::Result<()> {
//! let calibration = Calibration { fingerprint: "c4 rows 0-63".into(), row_lengths: vec![8192; 64] };
//! let mut search = Search::new(&Spec::new(6, 2048, "my model, revision 3", calibration))?;
//! while let Some(candidate) = search.next().cloned() {
//!     let loss = evaluate(&candidate.pattern); // Mean over all calibration rows.
//!     search.report(&candidate.pattern, loss)?;
//! }
//! let half = &search.result().patterns[&"1/2".parse().unwrap()];
//! assert_eq!(half.pattern.to_string(), "FSSSFF");
//! # Ok(())
//! # }
//! ```
//!
//! All state is the [`Spec`] and the losses reported so far; what to ask next, and what the result is, follows from
//! them. [`Search::save`] puts them into a journal that every later loss is added to before `report` returns, so a
//! search that was killed goes on with [`Search::resume`] where it was: no pattern is measured twice, and the result is
//! the same.

mod journal;
mod outcome;
mod spec;

pub use outcome::{LayerLoss, LazyDiffers, Outcome, PatternLoss, Retention, Step, Swap};
pub use spec::{Calibration, CalibrationSummary, Method, Settings, Spec};

use crate::error::{Error, Result};
use crate::plan::{Indexers, Pattern, Role};
use journal::Journal;
use spec::Turn;
use std::collections::HashMap;
use std::path::Path;

/// A pattern whose loss the search needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// What to measure.
    pub pattern: Pattern,
    /// The pattern that the search has got to. The candidate is a small change of it.
    pub base: Pattern,
    /// The first layer whose role differs from `base`. Hidden states that enter it, and the indices of the last Full
    /// layer before it, are those of `base`: a host that kept them from one run of `base` starts here. 0 for the
    /// all-Full pattern, which comes first.
    pub first_changed_layer: u32,
}

/// How far a search is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Losses reported.
    pub evaluations: u64,
    /// Losses that the whole search takes. Exact, except that refinement counts with the round it is in or will begin
    /// with: each swap adds another.
    pub expected: u64,
}

#[derive(Clone, Copy)]
enum Change {
    /// The all-Full pattern itself.
    AllFull,
    /// A layer becomes Shared.
    Flip { layer: u32 },
    /// A Full and a Shared layer are exchanged.
    Swap { to_shared: u32, to_full: u32 },
}

/// What the candidates of the moment are for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    AllFull,
    Steps,
    Swaps,
    Done,
}

/// A search between two questions.
pub struct Search {
    settings: Settings,
    turns: Vec<Turn>,
    /// Every reported loss.
    losses: HashMap<Pattern, f64>,
    /// The keys of `losses`, in the order of the reports.
    reported: Vec<Pattern>,
    journal: Option<Journal>,

    // All below follows from the settings and the losses.
    phase: Phase,
    base: Pattern,
    base_loss: f64,
    /// What the present round compares, in the order of preference among equals.
    trials: Vec<(Change, Pattern)>,
    /// The losses of the first of them.
    found: Vec<f64>,
    next: Option<Candidate>,
    all_full_loss: Option<f64>,
    steps: Vec<Step>,
    swaps: Vec<Swap>,
    /// By layer: how much its flip raised the loss when it was last tried.
    rises: Vec<f64>,
    saved: u64,
    lazy_differs: LazyDiffers,
}

impl Search {
    /// Begins a search.
    pub fn new(spec: &Spec) -> Result<Self> {
        let settings = Settings::new(spec)?;
        let all_full = Pattern::all_full(&Indexers::any(settings.layers.into())?)?;
        let mut search = Self {
            turns: settings.turns(),
            rises: vec![0.0; settings.layers as usize],
            settings,
            losses: HashMap::new(),
            reported: Vec::new(),
            journal: None,
            phase: Phase::AllFull,
            base: all_full.clone(),
            base_loss: f64::NAN,
            trials: vec![(Change::AllFull, all_full)],
            found: Vec::new(),
            next: None,
            all_full_loss: None,
            steps: Vec::new(),
            swaps: Vec::new(),
            saved: 0,
            lazy_differs: LazyDiffers::default(),
        };
        search.advance();
        Ok(search)
    }

    /// Goes on with the search whose journal `path` is, and with the journal. `spec` must be the one it began with:
    /// another model, calibration set or strategy is refused, and so is a file that is damaged anywhere but in a last
    /// line that was being written.
    pub fn resume(path: impl AsRef<Path>, spec: &Spec) -> Result<Self> {
        let mut search = Self::new(spec)?;
        let (mut journal, known) = Journal::open(path.as_ref(), &search.settings)?;
        for ((pattern, loss), number) in known.into_iter().zip(2..) {
            if search.next.as_ref().is_none_or(|next| next.pattern != pattern) {
                return Err(journal.damaged(number, "the loss that the search asked for"));
            }
            search.learn(pattern, loss);
        }
        journal.begin(&search.settings)?;
        search.journal = Some(journal);
        Ok(search)
    }

    /// Makes the new file `path` the search's journal: it receives all losses reported so far, and each later one
    /// before its `report` returns. All of it is on the disk then. Does nothing if `path` is the journal already.
    pub fn save(&mut self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        if self.journal.as_ref().is_some_and(|journal| journal.is_at(path)) {
            return Ok(());
        }
        let known = self.reported.iter().filter_map(|p| Some((p, *self.losses.get(p)?)));
        self.journal = Some(Journal::create(path, &self.settings, known)?);
        Ok(())
    }

    /// The pattern to measure next, the same until its loss is reported; `None` when the search is complete.
    pub fn next(&self) -> Option<&Candidate> {
        self.next.as_ref()
    }

    /// Takes the loss of the pattern that [`Search::next`] gave. With a journal, it is on the disk when this returns.
    /// A loss that was reported before may be reported again if it is the same. An error changes nothing.
    pub fn report(&mut self, pattern: &Pattern, loss: f64) -> Result<()> {
        if !loss.is_finite() {
            return Err(Error::invalid("loss", "a finite number", loss));
        }
        if let Some(&known) = self.losses.get(pattern) {
            if known.to_bits() == loss.to_bits() {
                return Ok(());
            }
            let expected = format_args!("{known:?} as reported before for {pattern}");
            return Err(Error::invalid("loss", expected, format_args!("{loss:?}")));
        }
        match &self.next {
            Some(next) if next.pattern == *pattern => {}
            Some(next) => return Err(Error::invalid("pattern", &next.pattern, pattern)),
            None => {
                return Err(Error::invalid("pattern", "none: the search is complete", pattern));
            }
        }
        if let Some(journal) = &mut self.journal {
            journal.append(pattern, loss)?;
        }
        self.learn(pattern.clone(), loss);
        Ok(())
    }

    /// What is known so far; the whole answer once [`Search::next`] gives `None`.
    pub fn result(&self) -> Outcome {
        Outcome {
            format: "indexcache-search/1".into(),
            settings: self.settings.clone(),
            complete: self.phase == Phase::Done,
            all_full_loss: self.all_full_loss,
            steps: self.steps.clone(),
            swaps: self.swaps.clone(),
            evaluations: self.reported.len() as u64,
            saved_evaluations: self.saved,
            lazy_differs: self.lazy_differs,
            patterns: outcome::patterns(self.settings.layers, &self.steps),
        }
    }

    /// How far the search is.
    pub fn progress(&self) -> Progress {
        let evaluations = self.reported.len() as u64;
        let expected = match self.phase {
            Phase::Swaps | Phase::Done => {
                let open = self.trials.iter().filter(|(_, p)| !self.losses.contains_key(p));
                evaluations + open.count() as u64
            }
            Phase::AllFull | Phase::Steps => {
                let steps: u64 = self.turns.iter().map(|t| u64::from(t.tries)).sum();
                1 + steps + self.settings.first_swaps(&self.turns)
            }
        };
        Progress { evaluations, expected }
    }

    fn learn(&mut self, pattern: Pattern, loss: f64) {
        self.losses.insert(pattern.clone(), loss);
        self.reported.push(pattern);
        self.advance();
    }

    /// Decides all that the known losses decide, up to the next one that is missing.
    fn advance(&mut self) {
        self.next = loop {
            match self.trials.get(self.found.len()) {
                Some((_, pattern)) => match self.losses.get(pattern) {
                    Some(loss) => self.found.push(*loss),
                    None => break Some(self.candidate(pattern)),
                },
                None if self.phase == Phase::Done => break None,
                None => self.decide(),
            }
        };
    }

    fn candidate(&self, pattern: &Pattern) -> Candidate {
        Candidate {
            pattern: pattern.clone(),
            base: self.base.clone(),
            first_changed_layer: self.base.first_difference(pattern).unwrap_or(0) as u32,
        }
    }

    /// All losses of the round are there: commits the best of them and lays out the next round.
    fn decide(&mut self) {
        let trials = std::mem::take(&mut self.trials);
        let found = std::mem::take(&mut self.found);
        let tried: Vec<(Change, Pattern, f64)> =
            trials.into_iter().zip(found).map(|((c, p), loss)| (c, p, loss)).collect();
        let Some((change, pattern, loss)) = first_lowest(&tried, |t| t.2).cloned() else {
            self.phase = Phase::Done;
            return;
        };
        match change {
            Change::AllFull => self.all_full_loss = Some(loss),
            Change::Flip { layer } => self.step(layer, &pattern, loss, &tried),
            Change::Swap { to_shared, to_full } if loss < self.base_loss => {
                let full_layers = pattern.count(Role::Full) as u32;
                let pattern = pattern.clone();
                self.swaps.push(Swap { full_layers, to_shared, to_full, pattern, loss });
            }
            Change::Swap { .. } => {
                self.phase = Phase::Done;
                return;
            }
        }
        (self.base, self.base_loss) = (pattern, loss);
        self.lay_out();
    }

    /// Commits a flip.
    fn step(
        &mut self,
        flipped: u32,
        pattern: &Pattern,
        loss: f64,
        tried: &[(Change, Pattern, f64)],
    ) {
        let evaluated: Vec<LayerLoss> = tried
            .iter()
            .filter_map(|(change, _, loss)| match change {
                Change::Flip { layer } => Some(LayerLoss { layer: *layer, loss: *loss }),
                _ => None,
            })
            .collect();
        if let Some(turn) = self.turns.get(self.steps.len()) {
            self.saved += u64::from(turn.flips - turn.tries);
            if turn.compares {
                let layers = evaluated.iter().map(|e| e.layer).collect();
                self.lazy_differs.compared += 1;
                self.lazy_differs.differed += u64::from(!self.few(layers).contains(&flipped));
            }
        }
        for tried in &evaluated {
            if let Some(rise) = self.rises.get_mut(tried.layer as usize) {
                *rise = tried.loss - self.base_loss;
            }
        }
        let full_layers = pattern.count(Role::Full) as u32;
        self.steps.push(Step { full_layers, flipped, pattern: pattern.clone(), loss, evaluated });
    }

    /// Those of `layers` that lazy greedy tries: the lowest last rises, ties to the lowest layer; in ascending order.
    fn few(&self, mut layers: Vec<u32>) -> Vec<u32> {
        let Method::Lazy { few } = self.settings.method else { return layers };
        let rise = |layer: &u32| self.rises.get(*layer as usize).copied().unwrap_or(0.0);
        layers.sort_by(|a, b| rise(a).total_cmp(&rise(b)).then(a.cmp(b)));
        layers.truncate(few as usize);
        layers.sort_unstable();
        layers
    }

    /// What the next round compares, from the present base.
    fn lay_out(&mut self) {
        if let Some(turn) = self.turns.get(self.steps.len()) {
            self.phase = Phase::Steps;
            let [full, _] = self.movable(turn.stage);
            let tries = turn.tries as usize;
            let layers = if tries < full.len() { self.few(full) } else { full };
            let flip = |layer| (Change::Flip { layer }, self.base.with(layer, Role::Shared));
            self.trials = layers.into_iter().map(flip).collect();
            return;
        }
        if self.phase == Phase::Steps {
            let at = |s: &&Step| Some(s.full_layers) == self.settings.swap_full_layers;
            let Some(step) = self.steps.iter().find(at) else {
                self.phase = Phase::Done;
                return;
            };
            (self.base, self.base_loss) = (step.pattern.clone(), step.loss);
            self.phase = Phase::Swaps;
        }
        for stage in 0..self.settings.stages.len() {
            let [full, shared] = self.movable(stage);
            for (to_shared, to_full) in
                full.iter().flat_map(|f| shared.iter().map(move |s| (*f, *s)))
            {
                let pattern = self.base.with(to_shared, Role::Shared).with(to_full, Role::Full);
                self.trials.push((Change::Swap { to_shared, to_full }, pattern));
            }
        }
    }

    /// The Full and the Shared layers of a stage, ascending, without the pinned ones.
    fn movable(&self, stage: usize) -> [Vec<u32>; 2] {
        let layers = self.settings.stage_layers().get(stage).cloned().unwrap_or_default();
        let with = |role| {
            let free = |l: &u32| {
                !self.settings.is_pinned(*l) && self.base.roles().get(*l as usize) == Some(&role)
            };
            layers.clone().filter(free).collect()
        };
        [with(Role::Full), with(Role::Shared)]
    }
}

/// The lowest, and the first among equals.
fn first_lowest<T>(items: &[T], loss: impl Fn(&T) -> f64) -> Option<&T> {
    items.iter().reduce(|best, item| if loss(item) < loss(best) { item } else { best })
}
