//! Constraints on an output, from a request's words to what the engine asks. Compiling runs on the blocking pool.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::time::timeout_at;

use super::{
    params::{ConstraintParams, ServeError},
    service::Service,
};
use crate::{
    engine::ConstraintFactory,
    grammar::{Grammar, GrammarError},
};

/// Constraints that are compiled at a time.
pub(super) const COMPILATIONS: usize = 2;

/// Longest that a request waits for its constraint. What compiles it then still ends by itself, since its work is bounded.
const PATIENCE: Duration = Duration::from_secs(15);

impl Service {
    /// What bounds outputs, each from when it begins; `fresh`: no text precedes them.
    pub(super) async fn constraints(
        &self,
        constraint: &ConstraintParams,
        fresh: bool,
        deadline: Option<Instant>,
    ) -> Result<Arc<dyn ConstraintFactory>, ServeError> {
        let grammar = match self.inner.grammars.kept(constraint) {
            Some(kept) => kept,
            None => self.compile(constraint, deadline).await?,
        };
        Ok(grammar.outputs(fresh))
    }

    async fn compile(
        &self,
        constraint: &ConstraintParams,
        deadline: Option<Instant>,
    ) -> Result<Arc<Grammar>, ServeError> {
        let began = Instant::now();
        let patience = began + PATIENCE;
        let until = deadline.map_or(patience, |deadline| deadline.min(patience));
        let late = |what: ServeError| match deadline {
            Some(deadline) if deadline <= patience => ServeError::DeadlineExceeded(began.elapsed()),
            _ => what,
        };
        let place = timeout_at(until.into(), Arc::clone(&self.inner.compiling).acquire_owned()).await;
        let place = place.map_err(|_| late(ServeError::Overloaded("other constraints are being compiled".into())))?;
        let place = place.map_err(|_| ServeError::Draining)?;
        let (grammars, given) = (Arc::clone(&self.inner.grammars), constraint.clone());
        let compiling = tokio::task::spawn_blocking(move || {
            // held to the end, also if nobody waits for it any more
            let _place = place;
            grammars.compile(&given)
        });
        match timeout_at(until.into(), compiling).await {
            Ok(Ok(compiled)) => compiled.map_err(ServeError::from),
            Ok(Err(e)) => Err(ServeError::Internal(format!("compiling a constraint ended early: {e}"))),
            Err(_) => Err(late(ServeError::field(
                constraint.field(),
                format!("takes more than {} s to compile; a simpler one may do", PATIENCE.as_secs()),
            ))),
        }
    }
}

impl From<GrammarError> for ServeError {
    fn from(e: GrammarError) -> Self {
        match e {
            GrammarError::Refused(problems) => Self::Invalid(problems),
            GrammarError::TooLarge { .. } => Self::ConstraintMemory { message: e.to_string(), lasting: true },
            GrammarError::NoRoom { .. } => Self::ConstraintMemory { message: e.to_string(), lasting: false },
            GrammarError::Broken(_) => Self::Internal(e.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{EngineError, SubmitError};

    #[test]
    fn too_little_memory_is_told_and_whether_it_lasts() {
        let (bytes, limit) = (9, 8);
        let cases = [
            (ServeError::from(GrammarError::TooLarge { bytes, limit }), true),
            (ServeError::from(GrammarError::NoRoom { bytes, limit }), false),
            (ServeError::from(SubmitError::ConstraintTooLarge { bytes, limit }), true),
            (ServeError::from(EngineError::ConstraintMemory { bytes, limit }), false),
        ];
        for (error, lasts) in cases {
            let ServeError::ConstraintMemory { message, lasting } = error else { panic!("{error:?}") };
            assert!(lasting == lasts && message.contains("9 bytes") && message.contains('8'), "{message}");
        }
    }
}
