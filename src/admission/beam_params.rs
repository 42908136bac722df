//! What a request says of beam search.

/// Most beams of a request.
pub const MAX_BEAMS: u32 = 16;

/// When a search ends before the longest output, in the words of transformers' `early_stopping`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum EarlyStopping {
    /// When no open beam can do better, by a guess from the present length (`False`).
    #[default]
    Heuristic,
    /// As soon as as many outputs have ended as there are beams (`True`).
    Full,
    /// When no open beam can do better at any length (`"never"`).
    Never,
}

/// A beam search.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BeamParams {
    /// Outputs that are followed at a time, 2 to [`MAX_BEAMS`].
    pub beams: u32,
    /// Exponent of the length that divides the sum of an output's log-probabilities; over 0 favours long outputs.
    pub length_penalty: f32,
    /// When it ends.
    pub early_stopping: EarlyStopping,
}
