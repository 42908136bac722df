//! How records say what is as it was before they had a word for it: not at all, so that older ones read back and have the
//! same digests.

/// What older records mean.
pub(super) fn one() -> u32 {
    1
}

/// Left out of records.
pub(super) fn is_one(n: &u32) -> bool {
    *n == 1
}

/// Left out of records.
pub(super) fn is_zero(x: &f64) -> bool {
    *x == 0.0
}

/// Left out of records.
pub(super) fn is_none(n: &u32) -> bool {
    *n == 0
}
