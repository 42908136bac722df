//! Measures of predictions against gold: pure counts and formulas, the same for evaluations while training and for files
//! that are classified or continued. Conventions are those of scikit-learn, seqeval, sacrebleu and rouge-score.

mod classes;
mod sets;
mod spans;
mod text;
mod values;

pub use classes::Classes;
pub use sets::Sets;
pub use spans::{Span, Spans, has_spans, spans};
pub use text::{Bleu, Texts, rouge_l};
pub use values::Values;

/// Harmonic mean of precision and recall from counts; 0 where nothing was claimed or due.
fn f1(right: u64, claimed: u64, due: u64) -> f64 {
    ratio(2 * right, claimed + due)
}

fn ratio(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}
