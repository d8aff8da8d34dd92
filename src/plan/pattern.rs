//! Roles, patterns, and every spelling of a pattern that is not a frequency rule.

use super::dialects::Dialect;
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// More layers than any model has; a bound so that a hostile config cannot ask for memory.
pub const MAX_LAYERS: usize = 4096;

/// What a layer does about its indices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Role {
    /// No sparse attention: neither indexer nor indices.
    None = 0,
    /// Runs its indexer and writes the indices.
    Full = 1,
    /// Reads the indices of the nearest Full layer before it.
    Shared = 2,
}

impl Role {
    /// `F`, `S` or `-`.
    pub const fn letter(self) -> char {
        match self {
            Role::None => '-',
            Role::Full => 'F',
            Role::Shared => 'S',
        }
    }

    /// The word `indexer_types` uses, and `none`.
    pub const fn name(self) -> &'static str {
        match self {
            Role::None => "none",
            Role::Full => "full",
            Role::Shared => "shared",
        }
    }

    const fn from_letter(letter: char) -> Option<Self> {
        match letter {
            'F' => Some(Role::Full),
            'S' => Some(Role::Shared),
            '-' => Some(Role::None),
            _ => None,
        }
    }

    fn from_word(word: &str) -> Option<Self> {
        match word {
            "full" => Some(Role::Full),
            "shared" => Some(Role::Shared),
            _ => None,
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Which layers of a model have an indexer, and so a role to play.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Indexers {
    bears: Vec<bool>,
    /// The pattern itself may say that a layer has none.
    open: bool,
}

impl Indexers {
    /// `layers` layers, of which the pattern says with `-` which have no indexer.
    pub fn any(layers: u64) -> Result<Self> {
        Ok(Self { bears: vec![true; checked_layers(layers)?], open: true })
    }

    /// Exactly the layers marked `true` have one.
    pub fn exactly(bears: Vec<bool>) -> Result<Self> {
        checked_layers(bears.len() as u64)?;
        Ok(Self { bears, open: false })
    }

    /// Number of layers, with or without.
    pub fn layers(&self) -> usize {
        self.bears.len()
    }

    /// Number of layers that have one.
    pub fn count(&self) -> usize {
        self.bears.iter().filter(|b| **b).count()
    }

    /// Whether `layer` has one.
    pub fn bears(&self, layer: usize) -> bool {
        self.bears.get(layer).copied().unwrap_or(false)
    }

    /// Lays roles out over the layers: `roles` counts all layers, or only those with an indexer.
    fn place(&self, field: &str, roles: Vec<Role>) -> Result<Vec<Role>> {
        let (layers, count) = (self.layers(), self.count());
        let mut next = 0..;
        let at: Vec<Option<usize>> = if roles.len() == layers {
            (0..layers).map(Some).collect()
        } else if roles.len() == count {
            self.bears.iter().map(|b| if *b { next.next() } else { None }).collect()
        } else {
            return Err(self.wrong_length(field, roles.len()));
        };
        let mut placed = Vec::with_capacity(layers);
        for (layer, index) in at.into_iter().enumerate() {
            let role = match index.and_then(|i| roles.get(i)) {
                Some(role) if self.bears(layer) => *role,
                _ => Role::None,
            };
            if role == Role::None && self.bears(layer) && !self.open {
                return Err(Error::config(format!(
                    "{field}: '-' says that layer {layer} has no sparse attention, but the model has an indexer there; write F or S"
                )));
            }
            placed.push(role);
        }
        Ok(placed)
    }

    fn wrong_length(&self, field: &str, got: usize) -> Error {
        let (layers, count) = (self.layers(), self.count());
        let model = if count == layers {
            format!("{layers} layers: give {layers} entries")
        } else {
            format!(
                "{layers} layers, {count} of them with an indexer: give {layers} entries, or {count} for those alone"
            )
        };
        let hint = if got < layers {
            "nothing is filled in, because entries lost on the way shift every layer after the gap"
        } else {
            "nothing is cut off, because one entry too many shifts every layer after it (draft layers are always Full and not listed)"
        };
        Error::config(format!("{field} has {got} entries but the model has {model}; {hint}"))
    }
}

fn checked_layers(layers: u64) -> Result<usize> {
    match usize::try_from(layers) {
        Ok(n) if (1..=MAX_LAYERS).contains(&n) => Ok(n),
        _ => Err(Error::config(format!(
            "the number of layers must be from 1 to {MAX_LAYERS}, got {layers}"
        ))),
    }
}

/// A pattern in somebody's spelling.
#[derive(Clone, Copy, Debug)]
pub enum Spelling<'a> {
    /// `index_topk_pattern`: one letter a layer.
    Letters(&'a str),
    /// `index_topk_pattern` as a list of letters, or of the words of `indexer_types`.
    LetterList(&'a [&'a str]),
    /// `indexer_types`: `full` or `shared` a layer.
    IndexerTypes(&'a [&'a str]),
    /// `index_source_layer_ids`: the Full layers.
    SourceLayers(&'a [i64]),
    /// `index_topk_pattern` as a list of the layers that keep their indexer: the Full layers again.
    AllowList(&'a [i64]),
    /// `index_topk_freq` and `index_skip_topk_offset`.
    Freq {
        /// One Full layer in this many.
        freq: i64,
        /// Where the counting starts; `None` is the dialect's default.
        offset: Option<i64>,
        /// Whose rule.
        dialect: Dialect,
    },
}

impl Spelling<'_> {
    /// The config field that carries this spelling.
    pub const fn field(&self) -> &'static str {
        match self {
            Spelling::Letters(_) | Spelling::LetterList(_) | Spelling::AllowList(_) => {
                "index_topk_pattern"
            }
            Spelling::IndexerTypes(_) => "indexer_types",
            Spelling::SourceLayers(_) => "index_source_layer_ids",
            Spelling::Freq { .. } => "index_topk_freq",
        }
    }
}

/// One role a decoder layer; the first that is not `-` is Full. As JSON: its letters.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Pattern(Vec<Role>);

impl Pattern {
    /// Reads `spelling` for a model whose indexers are known.
    pub fn new(spelling: &Spelling<'_>, indexers: &Indexers) -> Result<Self> {
        let field = spelling.field();
        let roles = match spelling {
            Spelling::Letters(text) => indexers.place(field, letters(field, text)?)?,
            Spelling::LetterList(list) => indexers.place(field, letter_list(field, list)?)?,
            Spelling::IndexerTypes(list) => indexers.place(field, types(field, list)?)?,
            Spelling::SourceLayers(ids) | Spelling::AllowList(ids) => {
                sources(field, ids, indexers)?
            }
            Spelling::Freq { freq, offset, dialect } => dialect.expand(*freq, *offset, indexers)?,
        };
        Self::from_roles(field, roles)
    }

    /// Every layer with an indexer is Full: plain DSA.
    pub fn all_full(indexers: &Indexers) -> Result<Self> {
        let full = |b: &bool| if *b { Role::Full } else { Role::None };
        Self::from_roles("pattern", indexers.bears.iter().map(full).collect())
    }

    /// The one check of order that every spelling ends in.
    pub(super) fn from_roles(field: &str, roles: Vec<Role>) -> Result<Self> {
        checked_layers(roles.len() as u64)?;
        match roles.iter().position(|r| *r != Role::None) {
            None => Err(Error::config(format!(
                "{field}: no layer has an indexer, so there is nothing to plan"
            ))),
            Some(0) if roles.first() == Some(&Role::Shared) => Err(Error::config(format!(
                "{field}: layer 0 is Shared, but no layer before it has selected anything; make layer 0 Full"
            ))),
            Some(first) if roles.get(first) == Some(&Role::Shared) => Err(Error::config(format!(
                "{field}: layer {first} is Shared before any layer is Full; make layer {first}, the first with sparse attention, Full"
            ))),
            Some(_) => Ok(Self(roles)),
        }
    }

    /// The roles, one a layer.
    pub fn roles(&self) -> &[Role] {
        &self.0
    }

    /// Number of layers.
    pub fn layers(&self) -> usize {
        self.0.len()
    }

    /// How many layers have this role.
    pub fn count(&self, role: Role) -> usize {
        self.0.iter().filter(|r| **r == role).count()
    }

    /// The letters of the layers that have an indexer: the short form of `index_topk_pattern`.
    pub fn compact(&self) -> String {
        self.0.iter().filter(|r| **r != Role::None).map(|r| r.letter()).collect()
    }

    /// As `indexer_types`. A layer without an indexer is "full" there, as in the checkpoints that have such layers.
    pub fn indexer_types(&self) -> Vec<&'static str> {
        let word = |r: &Role| if *r == Role::Shared { "shared" } else { "full" };
        self.0.iter().map(word).collect()
    }

    /// As `index_source_layer_ids`: the Full layers.
    pub fn source_layers(&self) -> Vec<u32> {
        (0..).zip(&self.0).filter(|(_, r)| **r == Role::Full).map(|(l, _)| l).collect()
    }

    /// First layer on which the two differ; the shorter one's end counts.
    pub fn first_difference(&self, other: &Self) -> Option<usize> {
        let longest = self.layers().max(other.layers());
        (0..longest).find(|l| self.0.get(*l) != other.0.get(*l))
    }
}

impl Pattern {
    /// With another role for `layer`, unless that is the first sparse layer or has no indexer: those stay.
    pub(crate) fn with(&self, layer: u32, role: Role) -> Self {
        let mut roles = self.0.clone();
        let mut others = (0..).zip(&mut roles).filter(|(_, r)| **r != Role::None).skip(1);
        if let Some((_, r)) = others.find(|(l, _)| *l == layer) {
            *r = role;
        }
        Self(roles)
    }
}

impl From<Pattern> for String {
    fn from(pattern: Pattern) -> Self {
        pattern.to_string()
    }
}

impl TryFrom<String> for Pattern {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|r| write!(f, "{}", r.letter()))
    }
}

impl FromStr for Pattern {
    type Err = Error;

    /// The number of layers is the number of letters: use [`Pattern::new`] when the model is known.
    fn from_str(text: &str) -> Result<Self> {
        Self::from_roles("pattern", letters("pattern", text)?)
    }
}

fn letters(field: &str, text: &str) -> Result<Vec<Role>> {
    let read = |(position, letter)| {
        Role::from_letter(letter).ok_or_else(|| bad_letter(field, position, letter))
    };
    text.chars().enumerate().map(read).collect()
}

fn bad_letter(field: &str, position: usize, letter: char) -> Error {
    let shown = letter.escape_default();
    Error::config(match letter {
        'f' | 's' => format!(
            "{field}: '{shown}' at position {position} is lower case; write {}",
            letter.to_ascii_uppercase()
        ),
        _ => format!("{field}: '{shown}' at position {position} is not F (Full) or S (Shared)"),
    })
}

fn letter_list(field: &str, list: &[&str]) -> Result<Vec<Role>> {
    let read = |(position, text): (usize, &&str)| {
        let mut chars = text.chars();
        match (chars.next(), chars.next()) {
            (Some(letter), None) => {
                Role::from_letter(letter).ok_or_else(|| bad_letter(field, position, letter))
            }
            _ => Role::from_word(text).ok_or_else(|| {
                Error::config(format!(
                    "{field}: entry {position} is \"{}\", expected \"F\" or \"S\"",
                    text.escape_default()
                ))
            }),
        }
    };
    list.iter().enumerate().map(read).collect()
}

fn types(field: &str, list: &[&str]) -> Result<Vec<Role>> {
    let read = |(position, text): (usize, &&str)| {
        Role::from_word(text).ok_or_else(|| {
            Error::config(format!(
                "{field}: entry {position} is \"{}\", expected \"full\" or \"shared\"",
                text.escape_default()
            ))
        })
    };
    list.iter().enumerate().map(read).collect()
}

fn sources(field: &str, ids: &[i64], indexers: &Indexers) -> Result<Vec<Role>> {
    let mut roles: Vec<Role> =
        indexers.bears.iter().map(|b| if *b { Role::Shared } else { Role::None }).collect();
    if ids.is_empty() {
        return Err(Error::config(format!(
            "{field} is empty: at least the first layer must be listed"
        )));
    }
    let mut before = None;
    for id in ids {
        let last = indexers.layers() - 1;
        let slot = usize::try_from(*id).ok().and_then(|i| roles.get_mut(i));
        let Some(role) = slot else {
            return Err(Error::config(format!("{field}: layer {id} is outside 0..={last}")));
        };
        match before {
            Some(b) if b == id => {
                return Err(Error::config(format!("{field}: layer {id} is listed twice")));
            }
            Some(b) if b > id => {
                return Err(Error::config(format!(
                    "{field}: layer {id} comes after layer {b}; list the layers in ascending order"
                )));
            }
            _ => before = Some(id),
        }
        if *role == Role::None {
            return Err(Error::config(format!(
                "{field}: layer {id} has no sparse attention, so it cannot be a source"
            )));
        }
        *role = Role::Full;
    }
    Ok(roles)
}
