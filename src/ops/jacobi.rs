//! One-sided Jacobi rotations (Hestenes 1958) in f64: rows made orthogonal, for singular value decompositions of small
//! matrices. Not differentiable; for setting up, not for forwards.

/// Rounds of rotations; some ten suffice.
const SWEEPS: usize = 60;

/// The product of two vectors.
pub(crate) fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

/// Rotates pairs of rows of `b` until all are orthogonal; `also` is rotated alike. `stop` is asked once per row and sweep;
/// false: it said so, and the rows are not orthogonal yet.
#[must_use]
pub(crate) fn rotate(b: &mut [Vec<f64>], also: &mut [Vec<f64>], stop: &dyn Fn() -> bool) -> bool {
    for _ in 0..SWEEPS {
        let mut worst = 0f64;
        for i in 0..b.len() {
            if stop() {
                return false;
            }
            for j in i + 1..b.len() {
                let (x, y, xy) = (dot(&b[i], &b[i]), dot(&b[j], &b[j]), dot(&b[i], &b[j]));
                let off = xy.abs() / (x * y).sqrt().max(f64::MIN_POSITIVE);
                if off <= 1e-15 || xy == 0.0 {
                    continue;
                }
                worst = worst.max(off);
                let zeta = (y - x) / (2.0 * xy);
                let t = zeta.signum() / (zeta.abs() + (1.0 + zeta * zeta).sqrt());
                let t = if zeta == 0.0 { 1.0 } else { t };
                let c = 1.0 / (1.0 + t * t).sqrt();
                for m in [&mut *b, &mut *also] {
                    let (head, tail) = m.split_at_mut(j);
                    turn(&mut head[i], &mut tail[0], c, c * t);
                }
            }
        }
        if worst <= 1e-14 {
            break;
        }
    }
    true
}

fn turn(a: &mut [f64], b: &mut [f64], c: f64, s: f64) {
    for (x, y) in a.iter_mut().zip(b) {
        (*x, *y) = (c * *x - s * *y, s * *x + c * *y);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rotating_ends_when_it_is_told_to() {
        let rows = || -> Vec<Vec<f64>> {
            (0..12).map(|i| (0..12).map(|j| f64::from((i * 7 + j * j * 5) % 11)).collect()).collect()
        };
        let asked = std::cell::Cell::new(0);
        let stop = || {
            asked.set(asked.get() + 1);
            asked.get() > 3
        };
        assert!(!rotate(&mut rows(), &mut rows(), &stop));
        assert_eq!(asked.get(), 4, "at once, in the middle of a sweep");
        let mut b = rows();
        assert!(rotate(&mut b, &mut rows(), &|| false));
        assert!(dot(&b[0], &b[5]).abs() < 1e-9);
    }
}
