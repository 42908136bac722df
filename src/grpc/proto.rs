//! The generated protocol: messages, servers and clients of `deltaserve.v1`. Its reference is the comments in `proto/`.
//! Nothing outside `grpc` and `cli` uses it.
#![allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic, clippy::unwrap_used, reason = "generated code")]

tonic::include_proto!("deltaserve.v1");

/// The protocol's description, for server reflection and for the names of methods.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/deltaserve.bin"));

/// Enum values as JSON: `JOB_STATE_RUNNING` is `"running"`. The generated `Serialize` calls these.
pub(crate) mod json {
    use serde::Serializer;

    fn short(name: &str, prefix: &str) -> String {
        name.strip_prefix(prefix).unwrap_or(name).to_ascii_lowercase()
    }

    macro_rules! names {
        ($($function:ident: $enumeration:ident, $prefix:literal;)*) => {$(
            pub(crate) fn $function<S: Serializer>(value: &i32, to: S) -> Result<S::Ok, S::Error> {
                match super::$enumeration::try_from(*value) {
                    Ok(known) => to.serialize_str(&short(known.as_str_name(), $prefix)),
                    Err(_) => to.serialize_i32(*value),
                }
            }
        )*};
    }

    names! {
        finish_reason: FinishReason, "FINISH_REASON_";
        early_stopping: EarlyStopping, "EARLY_STOPPING_";
        pooling: Pooling, "POOLING_";
        delta_form: DeltaForm, "DELTA_FORM_";
        publish_mode: PublishMode, "PUBLISH_MODE_";
        task: Task, "TASK_";
        bias_subset: BiasSubset, "BIAS_SUBSET_";
        lora_bias: LoraBias, "LORA_BIAS_";
        lora_init: LoraInit, "LORA_INIT_";
        adapter_variant: AdapterVariant, "ADAPTER_VARIANT_";
        prompt_init: PromptInit, "PROMPT_INIT_";
        prefix_init: PrefixInit, "PREFIX_INIT_";
        prefix_form: PrefixForm, "PREFIX_FORM_";
        schedule: Schedule, "SCHEDULE_";
        problem_type: ProblemType, "PROBLEM_TYPE_";
        preference_method: PreferenceMethod, "PREFERENCE_METHOD_";
        job_state: JobState, "JOB_STATE_";
        merge_method: MergeMethod, "MERGE_METHOD_";
        majority_sign: MajoritySign, "MAJORITY_SIGN_";
    }
}
