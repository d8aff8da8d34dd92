//! Products of a few rows and a tile of rows, in f32: the two halves of attention, forward and backward.
//!
//! Idea: 4 x 4 sums (rows x tile rows, or rows x vectors) stay in registers. What is computed for one row does not
//! depend on which rows are beside it.
// Register blocks: one index runs over several arrays.
#![allow(clippy::needless_range_loop)]

use super::simd::Simd;

/// Rows a tile.
pub(super) const KEYS: usize = 32;

/// `p[h][j] = q[h]·tile[j]`.
pub(super) struct Scores<'a> {
    /// `[rows][stride]`, zero-padded to whole vectors.
    pub q: &'a [f32],
    /// `[KEYS][stride]`, likewise.
    pub tile: &'a [f32],
    /// `[rows][KEYS]`.
    pub p: &'a mut [f32],
    /// Floats from row to row of `q` and `tile`.
    pub stride: usize,
}

/// `out[h] = out[h] * fade[h] + sum_j p[h][j] * tile[j]`.
pub(super) struct Values<'a> {
    /// `[rows][stride]`.
    pub out: &'a mut [f32],
    /// `[rows][pitch]`.
    pub p: &'a [f32],
    /// Floats from row to row of `p`.
    pub pitch: usize,
    /// `[n][stride]`.
    pub tile: &'a [f32],
    /// Floats from row to row of `out` and `tile`: a multiple of four vectors.
    pub stride: usize,
}

impl Scores<'_> {
    /// The first `d` elements of `heads` rows and of `n` tile rows, rounded up to whole register blocks.
    ///
    /// # Safety
    /// The slices hold that much.
    #[inline(always)]
    pub(super) unsafe fn run<S: Simd>(&mut self, heads: usize, n: usize, d: usize) {
        let whole = heads / 4 * 4;
        // SAFETY: `KEYS` rows in the tile, a multiple of any block; the rest by contract.
        unsafe {
            if S::WIDE {
                for h in (0..whole).step_by(4) {
                    for j in (0..n).step_by(4) {
                        self.dots::<S, 4, 4>(h, j, d);
                    }
                }
                for h in whole..heads {
                    for j in (0..n).step_by(4) {
                        self.dots::<S, 1, 4>(h, j, d);
                    }
                }
            } else {
                for h in (0..whole).step_by(4) {
                    for j in 0..n {
                        self.dots::<S, 4, 1>(h, j, d);
                    }
                }
                for h in whole..heads {
                    for j in 0..n {
                        self.dots::<S, 1, 1>(h, j, d);
                    }
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn dots<S: Simd, const H: usize, const J: usize>(
        &mut self,
        h: usize,
        j: usize,
        d: usize,
    ) {
        // SAFETY: rows `h..h + H` of q and `j..j + J` of the tile, `d` padded to vectors by `stride`.
        unsafe {
            let q = self.q.as_ptr().add(h * self.stride);
            let k = self.tile.as_ptr().add(j * self.stride);
            let mut acc = [[S::splat(0.0); J]; H];
            for i in (0..d).step_by(16) {
                let mut y = [S::splat(0.0); J];
                for b in 0..J {
                    y[b] = S::load(k.add(b * self.stride + i));
                }
                for a in 0..H {
                    let x = S::load(q.add(a * self.stride + i));
                    for b in 0..J {
                        acc[a][b] = S::fma(x, y[b], acc[a][b]);
                    }
                }
            }
            for a in 0..H {
                for b in 0..J {
                    *self.p.get_unchecked_mut((h + a) * KEYS + j + b) = S::sum(acc[a][b]);
                }
            }
        }
    }
}

impl Values<'_> {
    /// The first `d` elements of `heads` rows, rounded up to blocks, from `n` tile rows.
    ///
    /// # Safety
    /// The slices hold that much.
    #[inline(always)]
    pub(super) unsafe fn run<S: Simd>(&mut self, heads: usize, n: usize, d: usize, fade: &[f32]) {
        let whole = heads / 4 * 4;
        // SAFETY: `stride` is a multiple of 64 elements and at least `d`; the rest by contract.
        unsafe {
            if S::WIDE {
                for i in (0..d).step_by(64) {
                    for h in (0..whole).step_by(4) {
                        self.blend::<S, 4, 4>(h, i, n, fade);
                    }
                    for h in whole..heads {
                        self.blend::<S, 1, 4>(h, i, n, fade);
                    }
                }
            } else {
                for i in (0..d).step_by(16) {
                    for h in (0..whole).step_by(4) {
                        self.blend::<S, 4, 1>(h, i, n, fade);
                    }
                    for h in whole..heads {
                        self.blend::<S, 1, 1>(h, i, n, fade);
                    }
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn blend<S: Simd, const H: usize, const J: usize>(
        &mut self,
        h: usize,
        i: usize,
        n: usize,
        fade: &[f32],
    ) {
        // SAFETY: rows `h..h + H` of out and p, `n` rows of the tile, columns `i..i + 16 * J` within `stride`.
        unsafe {
            let out = self.out.as_mut_ptr().add(h * self.stride + i);
            let p = self.p.as_ptr().add(h * self.pitch);
            let mut v = self.tile.as_ptr().add(i);
            let mut acc = [[S::splat(0.0); J]; H];
            for a in 0..H {
                let f = S::splat(*fade.get_unchecked(h + a));
                for b in 0..J {
                    acc[a][b] = S::mul(S::load(out.add(a * self.stride + 16 * b)), f);
                }
            }
            for j in 0..n {
                let mut y = [S::splat(0.0); J];
                for b in 0..J {
                    y[b] = S::load(v.add(16 * b));
                }
                for a in 0..H {
                    let x = S::splat(*p.add(a * self.pitch + j));
                    for b in 0..J {
                        acc[a][b] = S::fma(x, y[b], acc[a][b]);
                    }
                }
                v = v.add(self.stride);
            }
            for a in 0..H {
                for b in 0..J {
                    S::store(out.add(a * self.stride + 16 * b), acc[a][b]);
                }
            }
        }
    }
}
