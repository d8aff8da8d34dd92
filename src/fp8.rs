//! fp8 e4m3fn: 1 sign, 4 exponent (bias 7), 3 mantissa bits; no infinities, NaN at 0x7f and 0xff, largest 448.

/// Largest finite value.
pub const MAX: f32 = 448.0;

/// The value of a code.
pub const fn decode(code: u8) -> f32 {
    f32::from_bits((TO_BF16[code as usize] as u32) << 16)
}

/// Nearest code, ties to even, saturating at [`MAX`]; NaN stays NaN. (A framework's cast of a value that was
/// clamped to ±448 first gives the same bits.)
pub fn encode(x: f32) -> u8 {
    let sign = ((x.to_bits() >> 24) & 0x80) as u8;
    let a = x.abs();
    let magnitude = if a.is_nan() {
        0x7f
    } else if a >= MAX {
        0x7e
    } else if a < 0.015625 {
        // Under the smallest normal 2^-6, codes count steps of 2^-9: adding 1.5 * 2^23 rounds to even.
        (((a * 512.0) + 12_582_912.0).to_bits() & 0x1f) as u8
    } else {
        // Round the mantissa to three bits, ties to even, then move the exponent bias from 127 to 7.
        let bits = a.to_bits();
        let rounded = bits + 0x7ffff + ((bits >> 20) & 1);
        ((rounded >> 20) - (120 << 3)) as u8
    };
    sign | magnitude
}

/// Every code's value as bf16 bits; exact, since e4m3 fits in bf16.
pub const TO_BF16: [u16; 256] = {
    let mut table = [0u16; 256];
    let mut code = 0usize;
    while code < 256 {
        let (sign, exp, man) = ((code as u16 >> 7) << 15, code as u16 >> 3 & 15, code as u16 & 7);
        table[code] = sign
            | match (exp, man) {
                (15, 7) => 0x7fc0,
                (0, 0) => 0,
                // man * 2^-9: normalise.
                (0, _) => {
                    let shift = man.leading_zeros() as u16 - 12; // 1..=3
                    ((127 - 6 - shift) << 7) | ((man << shift & 7) << 4)
                }
                _ => ((exp + 120) << 7) | (man << 4),
            };
        code += 1;
    }
    table
};

/// The smallest power of two that is not less than a positive, finite `x`.
pub fn pow2_at_least(x: f32) -> f32 {
    let bits = x.to_bits();
    let up = f32::from_bits((bits + 0x7f_ffff) & 0xff80_0000);
    if up.is_finite() { up } else { f32::MAX }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use super::*;

    /// The definition, digit by digit.
    fn value(code: u8) -> f64 {
        let (e, m) = (i32::from(code >> 3 & 15), f64::from(code & 7));
        let v = if e == 0 { m * 2f64.powi(-9) } else { (1.0 + m / 8.0) * 2f64.powi(e - 7) };
        if code & 0x7f == 0x7f {
            f64::NAN
        } else if code & 0x80 != 0 {
            -v
        } else {
            v
        }
    }

    #[test]
    fn decodes_every_code() {
        for code in 0..=255u8 {
            let (got, want) = (decode(code), value(code));
            assert!(f64::from(got) == want || got.is_nan() && want.is_nan(), "{code:#x}");
            assert_eq!(got.is_sign_negative(), code & 0x80 != 0, "{code:#x}");
            assert_eq!(encode(got), code, "{code:#x}");
        }
    }

    #[test]
    fn encodes_to_nearest_even() {
        for code in 0..0x7eu8 {
            let (a, b) = (value(code), value(code + 1));
            let middle = ((a + b) / 2.0) as f32; // exact
            let even = if code & 1 == 0 { code } else { code + 1 };
            assert_eq!(encode(middle), even, "between {a} and {b}");
            assert_eq!(encode(middle.next_down()), code);
            assert_eq!(encode(middle.next_up()), code + 1);
            assert_eq!(encode(-middle), even | 0x80);
        }
        for (x, want) in [
            (448.0, 0x7e),
            (463.9, 0x7e),
            (1e30, 0x7e),
            (f32::INFINITY, 0x7e),
            (f32::NEG_INFINITY, 0xfe),
            (1e-30, 0),
            (f32::MIN_POSITIVE / 2.0, 0),
            (-0.0, 0x80),
            (1.0, 0x38),
            (0.015625, 0x08),
            (0.001953125, 0x01),
            (3.15, 0x45),
        ] {
            assert_eq!(encode(x), want, "{x}");
        }
        assert_eq!(encode(f32::NAN) & 0x7f, 0x7f);
    }

    #[test]
    fn powers_of_two_round_up() {
        for (x, want) in
            [(1.0, 1.0), (1.0f32.next_up(), 2.0), (0.75, 1.0), (0.3, 0.5), (2e-7, 2f32.powi(-22))]
        {
            assert_eq!(pow2_at_least(x), want);
        }
        assert!(pow2_at_least(f32::MAX).is_finite());
    }
}
