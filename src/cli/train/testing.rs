//! What tests of options share: the request that words make, checked case by case.

use super::{TrainArgs, spec};
use crate::grpc::proto::TrainingSpec;

/// The request of `deltaserve train` with these words behind a name and a dataset.
fn spec_of(words: &[&str]) -> anyhow::Result<TrainingSpec> {
    let words: Vec<String> = ["name", "--dataset", "d"].iter().chain(words).map(|w| (*w).to_owned()).collect();
    spec(&TrainArgs::of_words(&words)?, "d".into(), None)
}

/// That each line of words makes the request that `of` reads this from, or is refused (`None`).
#[track_caller]
pub(super) fn assert_options<T: PartialEq + std::fmt::Debug>(
    of: impl Fn(TrainingSpec) -> T,
    cases: impl IntoIterator<Item = (&'static str, Option<T>)>,
) {
    for (line, want) in cases {
        let words: Vec<&str> = line.split_whitespace().collect();
        assert_eq!(spec_of(&words).map(&of).ok(), want, "{line:?}");
    }
}
