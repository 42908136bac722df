//! Checks of the calls that read inputs, Classify, Embed and Score, and of what all inference calls have.

use super::{
    check::{MAX_INPUTS, MAX_PROMPTS, Problems, Range},
    params::{ClassifyInput, ClassifyParams, EmbedParams, ScoreParams, ServeError},
};

/// Highest priority of a request; its negative is the lowest.
const MOST_PRIORITY: i32 = 100;

/// Checks a priority.
pub(super) fn check_priority(field: &str, priority: i32, problems: &mut Problems) {
    problems.require((-MOST_PRIORITY..=MOST_PRIORITY).contains(&priority), field, || {
        format!("is {priority}; accepted is -{MOST_PRIORITY} to {MOST_PRIORITY}")
    });
}

impl ClassifyParams {
    /// Checks everything.
    ///
    /// # Errors
    /// [`ServeError::Invalid`] with all problems.
    pub fn check(&self) -> Result<(), ServeError> {
        let mut problems = Problems::default();
        check_priority("priority", self.priority, &mut problems);
        problems.count("inputs", self.inputs.len(), 1, MAX_INPUTS);
        problems.range("threshold", self.threshold.into(), &Range::closed(0.0, 1.0));
        for (i, input) in self.inputs.iter().enumerate().take(MAX_INPUTS) {
            match input {
                ClassifyInput::Text { text, .. } => {
                    problems.require(!text.is_empty(), &format!("inputs[{i}].text"), || "must not be empty".into());
                }
                ClassifyInput::Words(words) => {
                    problems.require(!words.is_empty(), &format!("inputs[{i}].words"), || "must not be empty".into());
                }
            }
        }
        problems.finish()
    }
}

impl EmbedParams {
    /// Checks everything.
    ///
    /// # Errors
    /// [`ServeError::Invalid`] with all problems.
    pub fn check(&self) -> Result<(), ServeError> {
        let mut problems = Problems::default();
        check_priority("priority", self.priority, &mut problems);
        problems.count("inputs", self.inputs.len(), 1, MAX_INPUTS);
        for (i, text) in self.inputs.iter().enumerate().take(MAX_INPUTS) {
            problems.require(!text.is_empty(), &format!("inputs[{i}]"), || "must not be empty".into());
        }
        problems.finish()
    }
}

impl ScoreParams {
    /// Checks everything.
    ///
    /// # Errors
    /// [`ServeError::Invalid`] with all problems.
    pub fn check(&self) -> Result<(), ServeError> {
        let mut problems = Problems::default();
        check_priority("priority", self.priority, &mut problems);
        problems.count("inputs", self.inputs.len(), 1, MAX_PROMPTS);
        for (i, (_, completion)) in self.inputs.iter().enumerate().take(MAX_PROMPTS) {
            problems.require(!completion.is_empty(), &format!("inputs[{i}].completion"), || "must not be empty".into());
        }
        problems.finish()
    }
}
