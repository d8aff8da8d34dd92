//! How much of a layer's own selection a reused one covers.

/// `|own ∩ reused| / |own|` of two ascending index rows with -1 tails; 1 where `own` is empty.
pub fn overlap(own: &[i32], reused: &[i32]) -> f32 {
    let live = |row: &[i32]| row.iter().position(|&i| i < 0).unwrap_or(row.len());
    let (own, reused) = (&own[..live(own)], &reused[..live(reused)]);
    let (mut i, mut j, mut both) = (0, 0, 0usize);
    while let (Some(a), Some(b)) = (own.get(i), reused.get(j)) {
        both += usize::from(a == b);
        i += usize::from(a <= b);
        j += usize::from(b <= a);
    }
    if own.is_empty() { 1.0 } else { both as f32 / own.len() as f32 }
}

#[cfg(test)]
mod tests {
    use super::overlap;

    #[test]
    fn counts_what_is_covered() {
        assert_eq!(overlap(&[1, 3, 5, -1], &[3, 4, 5, 9]), 2.0 / 3.0);
        assert_eq!(overlap(&[0, 1, 2, 3], &[-1, -1]), 0.0);
        assert_eq!(overlap(&[-1], &[3]), 1.0);
        assert_eq!(overlap(&[], &[]), 1.0);
        assert_eq!(overlap(&[7], &[7]), 1.0);
    }
}
