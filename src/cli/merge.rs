//! Weighted deltas on the command line: `deltas merge`, and the deltas of a request.

use clap::{Args, ValueEnum};

use super::deltas::PublishArgs;
use crate::grpc::proto;

/// Options of `deltas merge`.
#[derive(Debug, Clone, Args)]
pub(super) struct MergeArgs {
    /// Name to publish under.
    #[arg(long)]
    name: String,
    /// How.
    #[arg(long)]
    method: MethodArg,
    /// ties, magnitude-prune, dare-linear, dare-ties: share of the numbers that is kept.
    #[arg(long)]
    density: Option<f64>,
    /// ties, dare-ties: elect signs by count instead of by sum.
    #[arg(long)]
    by_frequency: bool,
    /// svd: rank of the result.
    #[arg(long)]
    rank: Option<u32>,
    /// dare-linear, dare-ties: seed of what is dropped.
    #[arg(long)]
    seed: Option<u64>,
    #[command(flatten)]
    publish: PublishArgs,
    /// What to merge: name=WEIGHT or name@version=WEIGHT; without a weight it is 1.
    #[arg(required = true, num_args = 2.., value_parser = weighted)]
    deltas: Vec<proto::WeightedDelta>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum MethodArg {
    /// Sums of A and of B. Equal ranks.
    Linear,
    /// Exactly the weighted sum; ranks add up.
    Cat,
    /// The weighted sum at a given rank.
    Svd,
    /// The largest numbers, elected signs. Equal ranks.
    Ties,
    /// The largest numbers, then linear. Equal ranks.
    MagnitudePrune,
    /// Random numbers dropped, then linear. Equal ranks.
    DareLinear,
    /// Random numbers dropped, elected signs. Equal ranks.
    DareTies,
}

impl MergeArgs {
    /// The request.
    pub(super) fn request(self) -> proto::MergeDeltasRequest {
        let method = match self.method {
            MethodArg::Linear => proto::MergeMethod::Linear,
            MethodArg::Cat => proto::MergeMethod::Cat,
            MethodArg::Svd => proto::MergeMethod::Svd,
            MethodArg::Ties => proto::MergeMethod::Ties,
            MethodArg::MagnitudePrune => proto::MergeMethod::MagnitudePrune,
            MethodArg::DareLinear => proto::MergeMethod::DareLinear,
            MethodArg::DareTies => proto::MergeMethod::DareTies,
        };
        let sign = if self.by_frequency { proto::MajoritySign::Frequency } else { proto::MajoritySign::Unspecified };
        proto::MergeDeltasRequest {
            policy: Some(self.publish.policy()),
            name: self.name,
            deltas: self.deltas,
            method: method.into(),
            density: self.density,
            majority_sign: sign.into(),
            rank: self.rank,
            seed: self.seed,
        }
    }
}

/// `name=WEIGHT`.
fn weighted(text: &str) -> Result<proto::WeightedDelta, String> {
    let (delta, weight) = match text.split_once('=') {
        Some((delta, weight)) => {
            (delta, Some(weight.parse().map_err(|_| format!("{weight:?} is no number; write name=0.5"))?))
        }
        None => (text, None),
    };
    Ok(proto::WeightedDelta { delta: delta.to_owned(), weight })
}

/// The deltas of a request: none, one reference, or several with weights; `a=0.7,b=0.3` is two.
pub(super) fn choice(given: &[String]) -> anyhow::Result<(String, Vec<proto::WeightedDelta>)> {
    let all: Vec<&str> = given.iter().flat_map(|text| text.split(',')).map(str::trim).collect();
    match all.as_slice() {
        [] => Ok(Default::default()),
        [one] if !one.contains('=') => Ok(((*one).to_owned(), Vec::new())),
        several => {
            let deltas = several.iter().map(|t| weighted(t).map_err(anyhow::Error::msg));
            Ok((String::new(), deltas.collect::<anyhow::Result<_>>()?))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deltas_have_weights_or_stand_alone() {
        let choice = |given: &[&str]| choice(&given.iter().map(|t| (*t).to_owned()).collect::<Vec<_>>()).ok();
        assert_eq!(choice(&[]), Some((String::new(), vec![])));
        assert_eq!(choice(&["a@3"]), Some(("a@3".into(), vec![])));
        let part = |delta: &str, weight| proto::WeightedDelta { delta: delta.into(), weight };
        let both = vec![part("a", Some(0.7)), part("b@2", None)];
        assert_eq!(choice(&["a=0.7, b@2"]), Some((String::new(), both.clone())));
        assert_eq!(choice(&["a=0.7", "b@2"]), Some((String::new(), both)));
        assert_eq!(choice(&["a=0.5"]), Some((String::new(), vec![part("a", Some(0.5))])));
        assert_eq!(choice(&["a=x"]), None);
    }
}
