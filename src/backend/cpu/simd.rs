//! Sixteen f32 lanes, three ways.
//!
//! Kernels are written once over [`Simd`] and compiled for each instruction set. Every method is defined lane by
//! lane, with the same roundings everywhere, so all of them give the same bits.

use super::Isa;
use crate::fp8;

/// Keys, or other columns, in a tile: four vectors.
pub(super) const TILE: usize = 64;

/// A piece of work that is generic over the instruction set. `run` must be `#[inline(always)]`.
pub(super) trait Kernel {
    type Out;
    /// # Safety
    /// The instruction set must be there; implementations add what they need of their fields.
    unsafe fn run<S: Simd>(self) -> Self::Out;
}

impl Isa {
    /// Runs a kernel compiled for this instruction set.
    ///
    /// # Safety
    /// As the kernel says. (That the instruction set is there was checked when the `Cpu` was made.)
    #[inline]
    pub(super) unsafe fn run<K: Kernel>(self, kernel: K) -> K::Out {
        #[cfg(target_arch = "x86_64")]
        {
            #[target_feature(
                enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16,avx2,fma,f16c"
            )]
            unsafe fn avx512<K: Kernel>(kernel: K) -> K::Out {
                // SAFETY: passed on.
                unsafe { kernel.run::<x86::Avx512>() }
            }
            #[target_feature(enable = "avx2,fma,f16c")]
            unsafe fn avx2<K: Kernel>(kernel: K) -> K::Out {
                // SAFETY: passed on.
                unsafe { kernel.run::<x86::Avx2>() }
            }
            match self {
                // SAFETY: detected; the rest is passed on.
                Isa::Avx512 => return unsafe { avx512(kernel) },
                // SAFETY: as above.
                Isa::Avx2 => return unsafe { avx2(kernel) },
                Isa::Scalar => {}
            }
        }
        // SAFETY: passed on.
        unsafe { kernel.run::<Scalar>() }
    }
}

/// Sixteen lanes of f32, and what the kernels do with them.
///
/// # Safety
/// Methods need the instruction set; pointers must be good for what the method reads or writes.
#[allow(clippy::missing_safety_doc)]
pub(super) trait Simd: Copy {
    /// Sixteen f32.
    type F: Copy;
    /// Sixteen bf16 pairs of one operand.
    type Pairs: Copy;
    /// One bf16 pair of the other, for all lanes.
    type Pair: Copy;
    /// Whether there are registers for a 4 x 4 block of `F`; else the kernels take 1 x 4.
    const WIDE: bool;

    unsafe fn splat(x: f32) -> Self::F;
    unsafe fn load(p: *const f32) -> Self::F;
    unsafe fn store(p: *mut f32, x: Self::F);
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`, rounded once.
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// `a > b ? a : b`: `b` where either is NaN.
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F;
    /// `v` where `x >= min` or `x` is NaN, else 0.
    unsafe fn gate(x: Self::F, min: f32, v: Self::F) -> Self::F;
    /// Bits of `a` plus bits of `b` shifted left by 23, as integers.
    unsafe fn scale_exponent(a: Self::F, b: Self::F) -> Self::F;
    /// Lanes added as a tree: `i` and `i + 8`, then 4, 2, 1 apart.
    unsafe fn sum(x: Self::F) -> f32;

    unsafe fn load_bf16(p: *const u16) -> Self::F;
    unsafe fn load_e4m3(p: *const u8) -> Self::F;

    unsafe fn pairs(p: *const u32) -> Self::Pairs;
    unsafe fn pair(x: u32) -> Self::Pair;
    /// Adds the products of the high halves, then those of the low halves, each rounded once. With values whose
    /// products are exact and results that are not subnormal, this is what `vdpbf16ps` computes.
    unsafe fn dot_pairs(acc: Self::F, a: Self::Pairs, b: Self::Pair) -> Self::F;

    /// Appends the [`rank`]s over `above` among sixteen scores, and their positions `first..`, to two lists of
    /// length `len` with room for sixteen more. Lanes with their bit clear in `live` are left out.
    #[inline(always)]
    unsafe fn append(
        scores: *const f32,
        live: u16,
        above: i32,
        first: i32,
        ranks: *mut i32,
        positions: *mut i32,
        len: usize,
    ) -> usize {
        let mut end = len;
        for i in 0..16 {
            // SAFETY: sixteen scores, room for sixteen more.
            unsafe {
                let r = rank(*scores.add(i));
                *ranks.add(end) = r;
                *positions.add(end) = first + i as i32;
                end += usize::from(r > above && live >> i & 1 == 1);
            }
        }
        end
    }

    /// Panel of fp8 keys: `panel[d][i]` is the bf16 pair of dimensions `2d`, `2d + 1` of key `i`. Columns from `n`
    /// on are left unspecified.
    #[inline(always)]
    unsafe fn panel_e4m3(keys: *const u8, stride: usize, n: usize, dim: usize, panel: *mut u32) {
        for i in 0..n {
            for d in 0..dim / 2 {
                // SAFETY: `n` keys of `dim` elements; a panel of `dim / 2` rows of `TILE`.
                unsafe {
                    let p = keys.add(i * stride + 2 * d);
                    let pair = [fp8::TO_BF16[*p as usize], fp8::TO_BF16[*p.add(1) as usize]];
                    *panel.add(d * TILE + i) = u32::from(pair[0]) | u32::from(pair[1]) << 16;
                }
            }
        }
    }

    /// The same of bf16 keys.
    #[inline(always)]
    unsafe fn panel_bf16(keys: *const u16, stride: usize, n: usize, dim: usize, panel: *mut u32) {
        for i in 0..n {
            for d in 0..dim / 2 {
                // SAFETY: as in `panel_e4m3`.
                unsafe {
                    let p = keys.add(i * stride + 2 * d);
                    let pair = [flush(*p), flush(*p.add(1))];
                    *panel.add(d * TILE + i) = u32::from(pair[0]) | u32::from(pair[1]) << 16;
                }
            }
        }
    }

    /// `e^x` for `x <= 0`, to 2 ulp; 0 under -87.
    #[inline(always)]
    unsafe fn exp(x: Self::F) -> Self::F {
        // SAFETY: plain arithmetic.
        unsafe {
            // n = round(x / ln 2) sits in the low mantissa bits of `shifted`.
            let magic = Self::splat(12_582_912.0);
            let shifted = Self::fma(x, Self::splat(std::f32::consts::LOG2_E), magic);
            let n = Self::sub(shifted, magic);
            let r = Self::fma(n, Self::splat(-0.693_145_75), x);
            let r = Self::fma(n, Self::splat(-1.428_606_8e-6), r);
            let mut p = Self::splat(1.0 / 720.0);
            for c in [1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
                p = Self::fma(p, r, Self::splat(c));
            }
            Self::gate(x, -87.0, Self::scale_exponent(p, shifted))
        }
    }
}

/// Scores as integers in the same order: NaN with -inf at the bottom, zeros of either sign equal.
#[inline(always)]
pub(super) fn rank(score: f32) -> i32 {
    let score = if score.is_nan() { f32::NEG_INFINITY } else { score + 0.0 };
    let bits = score.to_bits() as i32;
    bits ^ ((bits >> 31) as u32 >> 1) as i32
}

/// bf16 bits, or 0 for magnitudes under 2^-56: the lowest bit of any product is then at least 2^-126, so no sum of
/// products is subnormal, and flushing or not flushing those makes no difference.
#[inline(always)]
pub(super) fn flush(bits: u16) -> u16 {
    if bits & 0x7fff < FLUSH_BELOW { 0 } else { bits }
}

const FLUSH_BELOW: u16 = (127 - 56) << 7;

/// Plain Rust.
#[derive(Clone, Copy)]
pub(super) struct Scalar;

#[inline(always)]
fn zip(a: [f32; 16], b: [f32; 16], f: impl Fn(f32, f32) -> f32) -> [f32; 16] {
    std::array::from_fn(|i| f(a[i], b[i]))
}

impl Simd for Scalar {
    type F = [f32; 16];
    type Pairs = [u32; 16];
    type Pair = u32;
    const WIDE: bool = false;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::F {
        [x; 16]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self::F {
        // SAFETY: the caller's pointer.
        unsafe { p.cast::<[f32; 16]>().read() }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, x: Self::F) {
        // SAFETY: the caller's pointer.
        unsafe { p.cast::<[f32; 16]>().write(x) }
    }
    #[inline(always)]
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a - b)
    }
    #[inline(always)]
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }
    #[inline(always)]
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    unsafe fn gate(x: Self::F, min: f32, v: Self::F) -> Self::F {
        zip(x, v, |x, v| if x < min { 0.0 } else { v })
    }
    #[inline(always)]
    unsafe fn scale_exponent(a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| f32::from_bits(a.to_bits().wrapping_add(b.to_bits() << 23)))
    }
    #[inline(always)]
    unsafe fn sum(x: Self::F) -> f32 {
        let y: [f32; 8] = std::array::from_fn(|i| x[i] + x[i + 8]);
        let z: [f32; 4] = std::array::from_fn(|i| y[i] + y[i + 4]);
        (z[0] + z[2]) + (z[1] + z[3])
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> Self::F {
        // SAFETY: the caller's pointer.
        let bits = unsafe { p.cast::<[u16; 16]>().read_unaligned() };
        bits.map(|b| f32::from_bits(u32::from(b) << 16))
    }
    #[inline(always)]
    unsafe fn load_e4m3(p: *const u8) -> Self::F {
        // SAFETY: the caller's pointer.
        unsafe { p.cast::<[u8; 16]>().read() }.map(fp8::decode)
    }
    #[inline(always)]
    unsafe fn pairs(p: *const u32) -> Self::Pairs {
        // SAFETY: the caller's pointer.
        unsafe { p.cast::<[u32; 16]>().read() }
    }
    #[inline(always)]
    unsafe fn pair(x: u32) -> Self::Pair {
        x
    }
    #[inline(always)]
    unsafe fn dot_pairs(acc: Self::F, a: Self::Pairs, b: Self::Pair) -> Self::F {
        let high = |x: u32| f32::from_bits(x & 0xffff_0000);
        let low = |x: u32| f32::from_bits(x << 16);
        std::array::from_fn(|i| {
            let acc = high(a[i]).mul_add(high(b), acc[i]);
            low(a[i]).mul_add(low(b), acc)
        })
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    // The intrinsics are safe but for pointers and for being there; both are the trait's contract.
    #![allow(unused_unsafe, clippy::undocumented_unsafe_blocks)]
    use super::{FLUSH_BELOW, Simd, TILE};
    use crate::fp8;
    use std::arch::x86_64::*;

    /// AVX2, FMA, F16C: two registers make sixteen lanes.
    #[derive(Clone, Copy)]
    pub(in super::super) struct Avx2;

    impl Simd for Avx2 {
        type F = [__m256; 2];
        /// High halves, low halves.
        type Pairs = [[__m256; 2]; 2];
        type Pair = [__m256; 2];
        const WIDE: bool = false;

        #[inline(always)]
        unsafe fn splat(x: f32) -> Self::F {
            unsafe { [_mm256_set1_ps(x); 2] }
        }
        #[inline(always)]
        unsafe fn load(p: *const f32) -> Self::F {
            unsafe { [_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))] }
        }
        #[inline(always)]
        unsafe fn store(p: *mut f32, x: Self::F) {
            unsafe {
                _mm256_storeu_ps(p, x[0]);
                _mm256_storeu_ps(p.add(8), x[1]);
            }
        }
        #[inline(always)]
        unsafe fn add(a: Self::F, b: Self::F) -> Self::F {
            unsafe { [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])] }
        }
        #[inline(always)]
        unsafe fn sub(a: Self::F, b: Self::F) -> Self::F {
            unsafe { [_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])] }
        }
        #[inline(always)]
        unsafe fn mul(a: Self::F, b: Self::F) -> Self::F {
            unsafe { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
        }
        #[inline(always)]
        unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
            unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
        }
        #[inline(always)]
        unsafe fn max(a: Self::F, b: Self::F) -> Self::F {
            unsafe { [_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])] }
        }
        #[inline(always)]
        unsafe fn gate(x: Self::F, min: f32, v: Self::F) -> Self::F {
            unsafe {
                let m = _mm256_set1_ps(min);
                let a = _mm256_cmp_ps::<_CMP_NLT_UQ>(x[0], m);
                let b = _mm256_cmp_ps::<_CMP_NLT_UQ>(x[1], m);
                [_mm256_and_ps(a, v[0]), _mm256_and_ps(b, v[1])]
            }
        }
        #[inline(always)]
        unsafe fn scale_exponent(a: Self::F, b: Self::F) -> Self::F {
            unsafe {
                let one = |a, b| {
                    let b = _mm256_slli_epi32::<23>(_mm256_castps_si256(b));
                    _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), b))
                };
                [one(a[0], b[0]), one(a[1], b[1])]
            }
        }
        #[inline(always)]
        unsafe fn sum(x: Self::F) -> f32 {
            unsafe { sum8(_mm256_add_ps(x[0], x[1])) }
        }
        #[inline(always)]
        unsafe fn load_bf16(p: *const u16) -> Self::F {
            unsafe {
                let one = |p: *const u16| {
                    let x = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(x))
                };
                [one(p), one(p.add(8))]
            }
        }
        #[inline(always)]
        unsafe fn load_e4m3(p: *const u8) -> Self::F {
            unsafe {
                // As f16 with the exponent 8 too low; then NaN, which f16 would take for 480.
                let x = _mm256_cvtepu8_epi16(_mm_loadu_si128(p.cast()));
                let magnitude = _mm256_and_si256(x, _mm256_set1_epi16(0x7f));
                let sign = _mm256_slli_epi16::<8>(_mm256_and_si256(x, _mm256_set1_epi16(0x80)));
                let nan = _mm256_cmpeq_epi16(magnitude, _mm256_set1_epi16(0x7f));
                let half = _mm256_or_si256(_mm256_slli_epi16::<7>(magnitude), sign);
                let half = _mm256_or_si256(half, _mm256_and_si256(nan, _mm256_set1_epi16(0x7e00)));
                let s = _mm256_set1_ps(256.0);
                [
                    _mm256_mul_ps(_mm256_cvtph_ps(_mm256_castsi256_si128(half)), s),
                    _mm256_mul_ps(_mm256_cvtph_ps(_mm256_extracti128_si256::<1>(half)), s),
                ]
            }
        }
        #[inline(always)]
        unsafe fn pairs(p: *const u32) -> Self::Pairs {
            unsafe {
                let (a, b) = (_mm256_loadu_si256(p.cast()), _mm256_loadu_si256(p.add(8).cast()));
                [[high(a), high(b)], [low(a), low(b)]]
            }
        }
        #[inline(always)]
        unsafe fn pair(x: u32) -> Self::Pair {
            unsafe {
                let x = _mm256_set1_epi32(x as i32);
                [high(x), low(x)]
            }
        }
        #[inline(always)]
        unsafe fn dot_pairs(acc: Self::F, a: Self::Pairs, b: Self::Pair) -> Self::F {
            unsafe { Self::fma(a[1], [b[1]; 2], Self::fma(a[0], [b[0]; 2], acc)) }
        }
    }

    #[inline(always)]
    unsafe fn high(x: __m256i) -> __m256 {
        unsafe {
            _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(0xffff_0000u32 as i32)))
        }
    }
    #[inline(always)]
    unsafe fn low(x: __m256i) -> __m256 {
        unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(x)) }
    }
    #[inline(always)]
    unsafe fn sum8(x: __m256) -> f32 {
        unsafe {
            let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
            let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)))
        }
    }

    /// AVX-512 with BF16 and VBMI.
    #[derive(Clone, Copy)]
    pub(in super::super) struct Avx512;

    /// Low and high bytes of the bf16 value of codes 0 to 127.
    static BF16_BYTES: [[u8; 128]; 2] = {
        let mut t = [[0; 128]; 2];
        let mut i = 0;
        while i < 128 {
            [t[0][i], t[1][i]] = fp8::TO_BF16[i].to_le_bytes();
            i += 1;
        }
        t
    };
    /// Interleaves bytes `from`, `from + 1` of each u32 of two registers: low, high, low, high.
    const fn interleave(from: u8) -> [u8; 64] {
        let mut t = [0; 64];
        let mut i = 0;
        while i < 64 {
            t[i] = (i as u8 & !3) + from + (i as u8 >> 1 & 1) + (i as u8 & 1) * 64;
            i += 1;
        }
        t
    }
    static EVEN_PAIR: [u8; 64] = interleave(0);
    static ODD_PAIR: [u8; 64] = interleave(2);

    impl Simd for Avx512 {
        type F = __m512;
        type Pairs = __m512bh;
        type Pair = __m512bh;
        const WIDE: bool = true;

        #[inline(always)]
        unsafe fn splat(x: f32) -> Self::F {
            unsafe { _mm512_set1_ps(x) }
        }
        #[inline(always)]
        unsafe fn load(p: *const f32) -> Self::F {
            unsafe { _mm512_loadu_ps(p) }
        }
        #[inline(always)]
        unsafe fn store(p: *mut f32, x: Self::F) {
            unsafe { _mm512_storeu_ps(p, x) }
        }
        #[inline(always)]
        unsafe fn add(a: Self::F, b: Self::F) -> Self::F {
            unsafe { _mm512_add_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn sub(a: Self::F, b: Self::F) -> Self::F {
            unsafe { _mm512_sub_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn mul(a: Self::F, b: Self::F) -> Self::F {
            unsafe { _mm512_mul_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
            unsafe { _mm512_fmadd_ps(a, b, c) }
        }
        #[inline(always)]
        unsafe fn max(a: Self::F, b: Self::F) -> Self::F {
            unsafe { _mm512_max_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn gate(x: Self::F, min: f32, v: Self::F) -> Self::F {
            unsafe {
                let keep = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x, _mm512_set1_ps(min));
                _mm512_maskz_mov_ps(keep, v)
            }
        }
        #[inline(always)]
        unsafe fn scale_exponent(a: Self::F, b: Self::F) -> Self::F {
            unsafe {
                let b = _mm512_slli_epi32::<23>(_mm512_castps_si512(b));
                _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a), b))
            }
        }
        #[inline(always)]
        unsafe fn sum(x: Self::F) -> f32 {
            unsafe {
                sum8(_mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps::<1>(x)))
            }
        }
        #[inline(always)]
        unsafe fn load_bf16(p: *const u16) -> Self::F {
            unsafe {
                let x = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(x))
            }
        }
        #[inline(always)]
        unsafe fn load_e4m3(p: *const u8) -> Self::F {
            unsafe {
                // As in `Avx2`.
                let x = _mm256_cvtepu8_epi16(_mm_loadu_si128(p.cast()));
                let magnitude = _mm256_and_si256(x, _mm256_set1_epi16(0x7f));
                let sign = _mm256_slli_epi16::<8>(_mm256_and_si256(x, _mm256_set1_epi16(0x80)));
                let nan = _mm256_cmpeq_epi16_mask(magnitude, _mm256_set1_epi16(0x7f));
                let half = _mm256_or_si256(_mm256_slli_epi16::<7>(magnitude), sign);
                let half = _mm256_mask_mov_epi16(half, nan, _mm256_set1_epi16(0x7e00));
                _mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(256.0))
            }
        }
        #[inline(always)]
        unsafe fn pairs(p: *const u32) -> Self::Pairs {
            unsafe { std::mem::transmute(_mm512_loadu_si512(p.cast())) }
        }
        #[inline(always)]
        unsafe fn pair(x: u32) -> Self::Pair {
            unsafe { std::mem::transmute(_mm512_set1_epi32(x as i32)) }
        }
        #[inline(always)]
        unsafe fn dot_pairs(acc: Self::F, a: Self::Pairs, b: Self::Pair) -> Self::F {
            unsafe { _mm512_dpbf16_ps(acc, a, b) }
        }

        #[inline(always)]
        unsafe fn append(
            scores: *const f32,
            live: u16,
            above: i32,
            first: i32,
            ranks: *mut i32,
            positions: *mut i32,
            len: usize,
        ) -> usize {
            unsafe {
                let x = _mm512_add_ps(_mm512_loadu_ps(scores), _mm512_setzero_ps());
                let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x);
                let x = _mm512_mask_mov_ps(x, nan, _mm512_set1_ps(f32::NEG_INFINITY));
                let bits = _mm512_castps_si512(x);
                let flip = _mm512_srli_epi32::<1>(_mm512_srai_epi32::<31>(bits));
                let rank = _mm512_xor_si512(bits, flip);
                let keep = live & _mm512_cmpgt_epi32_mask(rank, _mm512_set1_epi32(above));
                if keep != 0 {
                    let lanes =
                        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
                    let position = _mm512_add_epi32(lanes, _mm512_set1_epi32(first));
                    // Compressing in registers: to memory it is microcode on some cores.
                    let rank = _mm512_maskz_compress_epi32(keep, rank);
                    let position = _mm512_maskz_compress_epi32(keep, position);
                    _mm512_storeu_si512(ranks.add(len).cast(), rank);
                    _mm512_storeu_si512(positions.add(len).cast(), position);
                }
                len + keep.count_ones() as usize
            }
        }

        #[inline(always)]
        unsafe fn panel_e4m3(
            keys: *const u8,
            stride: usize,
            n: usize,
            dim: usize,
            panel: *mut u32,
        ) {
            unsafe {
                let lut = |half: usize, at: usize| {
                    _mm512_loadu_si512(BF16_BYTES[half].as_ptr().add(at).cast())
                };
                let (low0, low1, high0, high1) = (lut(0, 0), lut(0, 64), lut(1, 0), lut(1, 64));
                let even = _mm512_loadu_si512(EVEN_PAIR.as_ptr().cast());
                let odd = _mm512_loadu_si512(ODD_PAIR.as_ptr().cast());
                let sign = _mm512_set1_epi8(-128);
                for group in 0..n.div_ceil(16) {
                    for from in (0..dim).step_by(64) {
                        let count = (dim - from).min(64);
                        let x = columns(keys.add(from), stride, group * 16, n, count);
                        for (j, &x) in x.iter().enumerate().take(count / 4) {
                            // Four dimensions of sixteen keys: look up both bytes, keep the sign, interleave.
                            let low = _mm512_permutex2var_epi8(low0, x, low1);
                            let high = _mm512_permutex2var_epi8(high0, x, high1);
                            let high = _mm512_or_si512(high, _mm512_and_si512(x, sign));
                            let out = panel.add((from / 2 + 2 * j) * TILE + group * 16);
                            let pair = _mm512_permutex2var_epi8(low, even, high);
                            _mm512_storeu_si512(out.cast(), pair);
                            let pair = _mm512_permutex2var_epi8(low, odd, high);
                            _mm512_storeu_si512(out.add(TILE).cast(), pair);
                        }
                    }
                }
            }
        }

        #[inline(always)]
        unsafe fn panel_bf16(
            keys: *const u16,
            stride: usize,
            n: usize,
            dim: usize,
            panel: *mut u32,
        ) {
            unsafe {
                let magnitude = _mm512_set1_epi16(0x7fff);
                let least = _mm512_set1_epi16(FLUSH_BELOW as i16);
                for group in 0..n.div_ceil(16) {
                    for from in (0..dim).step_by(32) {
                        let count = (dim - from).min(32);
                        let keys = keys.add(from).cast();
                        let x = columns(keys, stride * 2, group * 16, n, count * 2);
                        for (j, &x) in x.iter().enumerate().take(count / 2) {
                            let keep =
                                _mm512_cmpge_epu16_mask(_mm512_and_si512(x, magnitude), least);
                            let out = panel.add((from / 2 + j) * TILE + group * 16);
                            _mm512_storeu_si512(out.cast(), _mm512_maskz_mov_epi16(keep, x));
                        }
                    }
                }
            }
        }
    }

    /// `bytes` (at most 64) of sixteen rows from `first` on, as columns of u32; rows past `n` repeat the last.
    #[inline(always)]
    unsafe fn columns(
        rows: *const u8,
        stride: usize,
        first: usize,
        n: usize,
        bytes: usize,
    ) -> [__m512i; 16] {
        unsafe {
            let mask = u64::MAX >> (64 - bytes);
            let mut a = [_mm512_setzero_si512(); 16];
            for (i, a) in a.iter_mut().enumerate() {
                let row = rows.add((first + i).min(n - 1) * stride);
                *a = _mm512_maskz_loadu_epi8(mask, row.cast());
            }
            // A 16 x 16 transpose: pairs of rows, fours, then quarters.
            let mut b = a;
            for i in 0..8 {
                b[2 * i] = _mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
                b[2 * i + 1] = _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
            }
            for i in 0..4 {
                let j = 4 * i;
                a[j] = _mm512_unpacklo_epi64(b[j], b[j + 2]);
                a[j + 1] = _mm512_unpackhi_epi64(b[j], b[j + 2]);
                a[j + 2] = _mm512_unpacklo_epi64(b[j + 1], b[j + 3]);
                a[j + 3] = _mm512_unpackhi_epi64(b[j + 1], b[j + 3]);
            }
            for i in 0..4 {
                b[i] = _mm512_shuffle_i32x4::<0x88>(a[i], a[i + 4]);
                b[i + 4] = _mm512_shuffle_i32x4::<0xdd>(a[i], a[i + 4]);
                b[i + 8] = _mm512_shuffle_i32x4::<0x88>(a[i + 8], a[i + 12]);
                b[i + 12] = _mm512_shuffle_i32x4::<0xdd>(a[i + 8], a[i + 12]);
            }
            for i in 0..4 {
                a[i] = _mm512_shuffle_i32x4::<0x88>(b[i], b[i + 8]);
                a[i + 4] = _mm512_shuffle_i32x4::<0x88>(b[i + 4], b[i + 12]);
                a[i + 8] = _mm512_shuffle_i32x4::<0xdd>(b[i], b[i + 8]);
                a[i + 12] = _mm512_shuffle_i32x4::<0xdd>(b[i + 4], b[i + 12]);
            }
            a
        }
    }
}
