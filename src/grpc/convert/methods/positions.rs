//! Method parts that add positions, from the wire and to it.

use crate::{
    admission::{
        check::Problems,
        train_params::{PTuningPart, PrefixInit, PrefixLibrary, PrefixPart, PromptInit, PromptPart},
    },
    grpc::proto,
};

pub(super) fn prompt(at: &str, m: proto::PromptTuning, problems: &mut Problems) -> PromptPart {
    use proto::PromptInit as Wire;
    let init = match Wire::try_from(m.init) {
        Ok(Wire::Unspecified | Wire::Vocabulary) => PromptInit::Vocabulary,
        Ok(Wire::Random) => PromptInit::Random,
        Ok(Wire::Text) => PromptInit::Text,
        Err(unknown) => {
            problems.push(format!("{at}.prompt.init"), unknown.to_string());
            PromptInit::Vocabulary
        }
    };
    PromptPart { num_virtual_tokens: m.num_virtual_tokens, init, init_text: m.init_text }
}

pub(super) fn p_tuning(m: &proto::PTuning) -> PTuningPart {
    PTuningPart { num_virtual_tokens: m.num_virtual_tokens, encoder_hidden: m.encoder_hidden }
}

pub(super) fn prefix(at: &str, m: proto::PrefixTuning, problems: &mut Problems) -> PrefixPart {
    use proto::PrefixInit as Wire;
    let init = match Wire::try_from(m.init) {
        Ok(Wire::Unspecified) => None,
        Ok(Wire::Text) => Some(PrefixInit::Text),
        Ok(Wire::Random) => Some(PrefixInit::Random),
        Ok(Wire::Zeros) => Some(PrefixInit::Zeros),
        Err(unknown) => {
            problems.push(format!("{at}.prefix.init"), unknown.to_string());
            None
        }
    };
    let form = match proto::PrefixForm::try_from(m.form) {
        Ok(proto::PrefixForm::Unspecified) => None,
        Ok(proto::PrefixForm::Peft) => Some(PrefixLibrary::Peft),
        Ok(proto::PrefixForm::Adapterhub) => Some(PrefixLibrary::AdapterHub),
        Err(unknown) => {
            problems.push(format!("{at}.prefix.form"), unknown.to_string());
            None
        }
    };
    PrefixPart {
        num_virtual_tokens: m.num_virtual_tokens,
        init,
        init_text: m.init_text,
        projection: m.projection,
        projection_hidden: m.projection_hidden,
        form,
    }
}

pub(super) fn prompt_to_wire(m: PromptPart) -> proto::PromptTuning {
    let init = match m.init {
        PromptInit::Vocabulary => proto::PromptInit::Vocabulary,
        PromptInit::Random => proto::PromptInit::Random,
        PromptInit::Text => proto::PromptInit::Text,
    };
    proto::PromptTuning { num_virtual_tokens: m.num_virtual_tokens, init: init.into(), init_text: m.init_text }
}

pub(super) fn p_tuning_to_wire(m: &PTuningPart) -> proto::PTuning {
    proto::PTuning { num_virtual_tokens: m.num_virtual_tokens, encoder_hidden: m.encoder_hidden }
}

pub(super) fn prefix_to_wire(m: PrefixPart) -> proto::PrefixTuning {
    let init = match m.init {
        None => proto::PrefixInit::Unspecified,
        Some(PrefixInit::Text) => proto::PrefixInit::Text,
        Some(PrefixInit::Random) => proto::PrefixInit::Random,
        Some(PrefixInit::Zeros) => proto::PrefixInit::Zeros,
    };
    let form = match m.form {
        None => proto::PrefixForm::Unspecified,
        Some(PrefixLibrary::Peft) => proto::PrefixForm::Peft,
        Some(PrefixLibrary::AdapterHub) => proto::PrefixForm::Adapterhub,
    };
    proto::PrefixTuning {
        num_virtual_tokens: m.num_virtual_tokens,
        init: init.into(),
        init_text: m.init_text,
        projection: m.projection,
        projection_hidden: m.projection_hidden,
        form: form.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_come_back_as_they_were() {
        let mut problems = Problems::default();
        for init in [PromptInit::Vocabulary, PromptInit::Random, PromptInit::Text] {
            let part = PromptPart { num_virtual_tokens: Some(3), init, init_text: Some("a".into()) };
            assert_eq!(prompt("m", prompt_to_wire(part.clone()), &mut problems), part);
        }
        for init in [None, Some(PrefixInit::Text), Some(PrefixInit::Random), Some(PrefixInit::Zeros)] {
            let part = PrefixPart { init, projection: true, projection_hidden: Some(4), ..PrefixPart::default() };
            assert_eq!(prefix("m", prefix_to_wire(part.clone()), &mut problems), part);
        }
        for form in [None, Some(PrefixLibrary::Peft), Some(PrefixLibrary::AdapterHub)] {
            let part = PrefixPart { form, ..PrefixPart::default() };
            assert_eq!(prefix("m", prefix_to_wire(part.clone()), &mut problems), part);
        }
        let part = PTuningPart { num_virtual_tokens: Some(3), encoder_hidden: Some(9) };
        assert_eq!(p_tuning(&p_tuning_to_wire(&part)), part);
        assert!(problems.finish().is_ok());
        let mut problems = Problems::default();
        prefix("m", proto::PrefixTuning { init: 77, ..Default::default() }, &mut problems);
        assert!(problems.finish().is_err());
        let mut problems = Problems::default();
        prefix("m", proto::PrefixTuning { form: 77, ..Default::default() }, &mut problems);
        assert!(problems.finish().is_err());
    }
}
