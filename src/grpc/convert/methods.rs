//! Parts of a training request by method: protobuf to the domain's types and back.

mod positions;

use super::Problems;
use crate::{
    admission::train_params::{
        AdapterPart, AdapterScaling, AdapterVariant, BiasSubset, BitfitPart, Ia3Part, LnPart, LoraBias, LoraInit,
        LoraPart, MethodPart, Targets, TokensPart,
    },
    grpc::proto,
};

/// Method parts; none = LoRA with its defaults, if there are to be defaults.
pub(super) fn from_wire(parts: Vec<proto::MethodPart>, defaults: bool, problems: &mut Problems) -> Vec<MethodPart> {
    use proto::method_part::Part;
    if parts.is_empty() && defaults {
        return vec![MethodPart::Lora(LoraPart::default())];
    }
    let mut out = Vec::with_capacity(parts.len());
    for (i, part) in parts.into_iter().enumerate() {
        let at = format!("spec.methods[{i}]");
        match part.part {
            Some(Part::Lora(m)) => out.push(MethodPart::Lora(lora(&at, m, problems))),
            Some(Part::Bitfit(m)) => out.push(MethodPart::Bitfit(bitfit(&at, m, problems))),
            Some(Part::Adapter(m)) => out.push(MethodPart::Adapter(adapter(&at, m, problems))),
            Some(Part::Ia3(m)) => out.push(MethodPart::Ia3(ia3(&at, m, problems))),
            Some(Part::Ln(m)) => out.push(MethodPart::Ln(LnPart { targets: m.targets })),
            Some(Part::Tokens(m)) => out.push(MethodPart::Tokens(TokensPart { ids: m.ids })),
            Some(Part::Prefix(m)) => out.push(MethodPart::Prefix(positions::prefix(&at, m, problems))),
            Some(Part::Prompt(m)) => out.push(MethodPart::Prompt(positions::prompt(&at, m, problems))),
            Some(Part::PTuning(m)) => out.push(MethodPart::PTuning(positions::p_tuning(&m))),
            Some(Part::Full(proto::FullTuning {})) => out.push(MethodPart::Full),
            None => problems.push(at, "is empty; one kind is required"),
        }
    }
    out
}

fn refuse_false(field: String, value: bool, problems: &mut Problems) {
    if !value {
        problems.push(field, "is false; leave it out or set another");
    }
}

fn lora(at: &str, m: proto::Lora, problems: &mut Problems) -> LoraPart {
    use proto::lora::Targets as Wire;
    let targets = match m.targets {
        None | Some(Wire::AllLinear(true)) => Targets::AllLinear,
        Some(Wire::Modules(names)) => Targets::Modules(names.names),
        Some(Wire::AllLinear(false)) => {
            problems.push(format!("{at}.lora.all_linear"), "is false; leave it out or name modules");
            Targets::AllLinear
        }
    };
    let bias = match proto::LoraBias::try_from(m.bias) {
        Ok(proto::LoraBias::Unspecified | proto::LoraBias::None) => LoraBias::None,
        Ok(proto::LoraBias::LoraOnly) => LoraBias::LoraOnly,
        Ok(proto::LoraBias::All) => LoraBias::All,
        Err(unknown) => {
            problems.push(format!("{at}.lora.bias"), unknown.to_string());
            LoraBias::None
        }
    };
    let init = match proto::LoraInit::try_from(m.init) {
        Ok(proto::LoraInit::Unspecified | proto::LoraInit::Zero) => LoraInit::Zero,
        Ok(proto::LoraInit::Pissa) => LoraInit::Pissa,
        Err(unknown) => {
            problems.push(format!("{at}.lora.init"), unknown.to_string());
            LoraInit::Zero
        }
    };
    LoraPart {
        rank: m.rank,
        alpha: m.alpha,
        rslora: m.rslora,
        targets,
        rank_pattern: m.rank_pattern.into_iter().collect(),
        alpha_pattern: m.alpha_pattern.into_iter().collect(),
        dropout: m.dropout,
        dora: m.dora,
        bias,
        b_bias: m.b_bias,
        layers: m.layers,
        exclude: m.exclude,
        plus_ratio: m.plus_ratio,
        init,
        tokens: m.tokens,
        save_modules: m.save_modules,
    }
}

fn bitfit(at: &str, m: proto::Bitfit, problems: &mut Problems) -> BitfitPart {
    use proto::BiasSubset as Wire;
    let subset = match Wire::try_from(m.subset) {
        Ok(Wire::Unspecified | Wire::All) => BiasSubset::All,
        Ok(Wire::Attention) => BiasSubset::Attention,
        Ok(Wire::Mlp) => BiasSubset::Mlp,
        Ok(Wire::QueryAndMlpUp) => BiasSubset::QueryAndMlpUp,
        Ok(Wire::Norm) => BiasSubset::Norm,
        Err(unknown) => {
            problems.push(format!("{at}.bitfit.subset"), unknown.to_string());
            BiasSubset::All
        }
    };
    BitfitPart { subset, added: m.added }
}

fn ia3(at: &str, m: proto::Ia3, problems: &mut Problems) -> Ia3Part {
    use proto::ia3::Targets as Wire;
    let targets = match m.targets {
        None => None,
        Some(Wire::Modules(names)) => Some(Targets::Modules(names.names)),
        Some(Wire::AllLinear(on)) => {
            refuse_false(format!("{at}.ia3.all_linear"), on, problems);
            Some(Targets::AllLinear)
        }
    };
    Ia3Part { targets, feedforward: (!m.feedforward.is_empty()).then_some(m.feedforward) }
}

fn adapter(at: &str, m: proto::Adapter, problems: &mut Problems) -> AdapterPart {
    use proto::{AdapterVariant as Wire, adapter::Scaling};
    let variant = match Wire::try_from(m.variant) {
        Ok(Wire::Unspecified | Wire::Houlsby) => AdapterVariant::Houlsby,
        Ok(Wire::Pfeiffer) => AdapterVariant::Pfeiffer,
        Ok(Wire::Parallel) => AdapterVariant::Parallel,
        Err(unknown) => {
            problems.push(format!("{at}.adapter.variant"), unknown.to_string());
            AdapterVariant::Houlsby
        }
    };
    let scaling = m.scaling.map(|s| match s {
        Scaling::Fixed(s) => AdapterScaling::Fixed(s),
        Scaling::Learned(on) => {
            refuse_false(format!("{at}.adapter.learned"), on, problems);
            AdapterScaling::Learned
        }
        Scaling::Channel(on) => {
            refuse_false(format!("{at}.adapter.channel"), on, problems);
            AdapterScaling::Channel
        }
    });
    AdapterPart {
        variant,
        reduction_factor: m.reduction_factor,
        reduction_by_layer: m.reduction_by_layer.into_iter().collect(),
        activation: m.activation,
        scaling,
        leave_out: m.leave_out,
        train_norms: m.train_norms,
    }
}

/// A method part to the wire.
pub(super) fn to_wire(part: MethodPart) -> proto::MethodPart {
    use proto::method_part::Part;
    let part = match part {
        MethodPart::Lora(m) => Part::Lora(lora_to_wire(m)),
        MethodPart::Bitfit(m) => {
            let subset = match m.subset {
                BiasSubset::All => proto::BiasSubset::All,
                BiasSubset::Attention => proto::BiasSubset::Attention,
                BiasSubset::Mlp => proto::BiasSubset::Mlp,
                BiasSubset::QueryAndMlpUp => proto::BiasSubset::QueryAndMlpUp,
                BiasSubset::Norm => proto::BiasSubset::Norm,
            };
            Part::Bitfit(proto::Bitfit { subset: subset.into(), added: m.added })
        }
        MethodPart::Ia3(m) => {
            use proto::ia3::Targets as Wire;
            let targets = m.targets.map(|t| match t {
                Targets::AllLinear => Wire::AllLinear(true),
                Targets::Modules(names) => Wire::Modules(proto::ModuleNames { names }),
            });
            Part::Ia3(proto::Ia3 { targets, feedforward: m.feedforward.unwrap_or_default() })
        }
        MethodPart::Ln(m) => Part::Ln(proto::LnTuning { targets: m.targets }),
        MethodPart::Adapter(m) => Part::Adapter(adapter_to_wire(m)),
        MethodPart::Tokens(m) => Part::Tokens(proto::Tokens { ids: m.ids }),
        MethodPart::Prefix(m) => Part::Prefix(positions::prefix_to_wire(m)),
        MethodPart::Prompt(m) => Part::Prompt(positions::prompt_to_wire(m)),
        MethodPart::PTuning(m) => Part::PTuning(positions::p_tuning_to_wire(&m)),
        MethodPart::Full => Part::Full(proto::FullTuning {}),
    };
    proto::MethodPart { part: Some(part) }
}

fn lora_to_wire(m: LoraPart) -> proto::Lora {
    use proto::lora::Targets as WireTargets;
    proto::Lora {
        rank: m.rank,
        alpha: m.alpha,
        rslora: m.rslora,
        targets: Some(match m.targets {
            Targets::AllLinear => WireTargets::AllLinear(true),
            Targets::Modules(names) => WireTargets::Modules(proto::ModuleNames { names }),
        }),
        rank_pattern: m.rank_pattern.into_iter().collect(),
        alpha_pattern: m.alpha_pattern.into_iter().collect(),
        dropout: m.dropout,
        dora: m.dora,
        bias: match m.bias {
            LoraBias::None => proto::LoraBias::None,
            LoraBias::LoraOnly => proto::LoraBias::LoraOnly,
            LoraBias::All => proto::LoraBias::All,
        }
        .into(),
        b_bias: m.b_bias,
        layers: m.layers,
        exclude: m.exclude,
        plus_ratio: m.plus_ratio,
        init: match m.init {
            LoraInit::Zero => proto::LoraInit::Zero,
            LoraInit::Pissa => proto::LoraInit::Pissa,
        }
        .into(),
        tokens: m.tokens,
        save_modules: m.save_modules,
    }
}

fn adapter_to_wire(m: AdapterPart) -> proto::Adapter {
    use proto::adapter::Scaling;
    proto::Adapter {
        variant: match m.variant {
            AdapterVariant::Houlsby => proto::AdapterVariant::Houlsby,
            AdapterVariant::Pfeiffer => proto::AdapterVariant::Pfeiffer,
            AdapterVariant::Parallel => proto::AdapterVariant::Parallel,
        }
        .into(),
        reduction_factor: m.reduction_factor,
        reduction_by_layer: m.reduction_by_layer.into_iter().collect(),
        activation: m.activation,
        scaling: m.scaling.map(|s| match s {
            AdapterScaling::Fixed(s) => Scaling::Fixed(s),
            AdapterScaling::Learned => Scaling::Learned(true),
            AdapterScaling::Channel => Scaling::Channel(true),
        }),
        leave_out: m.leave_out,
        train_norms: m.train_norms,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_method_survives_the_wire() {
        let parts = vec![
            MethodPart::Lora(LoraPart {
                rank: Some(4),
                dora: true,
                bias: LoraBias::All,
                layers: vec![1],
                exclude: vec!["q".into()],
                plus_ratio: Some(16.0),
                init: LoraInit::Pissa,
                tokens: vec![3],
                save_modules: vec!["lm_head".into()],
                ..LoraPart::default()
            }),
            MethodPart::Bitfit(BitfitPart { subset: BiasSubset::Norm, added: true }),
            MethodPart::Ia3(Ia3Part { targets: Some(Targets::AllLinear), feedforward: Some(vec!["c_proj".into()]) }),
            MethodPart::Ln(LnPart { targets: vec!["ln_1".into()] }),
            MethodPart::Adapter(AdapterPart {
                variant: AdapterVariant::Parallel,
                reduction_by_layer: [(1, 4.0)].into(),
                scaling: Some(AdapterScaling::Learned),
                ..AdapterPart::default()
            }),
            MethodPart::Tokens(TokensPart { ids: vec![1, 2] }),
            MethodPart::Full,
        ];
        let mut problems = Problems::default();
        assert_eq!(from_wire(parts.clone().into_iter().map(to_wire).collect(), true, &mut problems), parts);
        problems.finish().expect("nothing is wrong");
        let mut problems = Problems::default();
        let bad = proto::Adapter {
            variant: 99,
            scaling: Some(proto::adapter::Scaling::Learned(false)),
            ..Default::default()
        };
        adapter("spec.methods[0]", bad, &mut problems);
        assert!(problems.finish().is_err());
    }
}
