//! Compiles the protocol without protoc, writes the descriptor set that server reflection serves, gives every message a
//! JSON form for the command line's `--json`, and tells the linker where a CUDA toolkit's libraries are.

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message;

const PACKAGE: &str = "deltaserve.v1";
const FILES: [&str; 5] = ["inference", "deltas", "training", "server", "tenants"];
const TYPE_BYTES: i32 = 12;
const TYPE_ENUM: i32 = 14;

fn main() -> Result<(), Box<dyn Error>> {
    let files: Vec<String> = FILES.iter().map(|f| format!("proto/deltaserve/v1/{f}.proto")).collect();
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(&files, ["proto"])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("deltaserve.bin"), descriptors.encode_to_vec())?;

    let mut build = tonic_prost_build::configure().bytes(".");
    build = build.type_attribute(".", "#[derive(serde::Serialize)] #[serde(rename_all = \"snake_case\")]");
    for message in descriptors.file.iter().flat_map(|file| &file.message_type) {
        let path = |field: &str| format!("{PACKAGE}.{}.{field}", message.name());
        for field in &message.field {
            match field.r#type() as i32 {
                // Enum fields are i32 in Rust; the JSON form has their names.
                TYPE_ENUM => {
                    let name = snake(field.type_name().rsplit('.').next().unwrap_or_default());
                    let attribute = format!("#[serde(serialize_with = \"crate::grpc::proto::json::{name}\")]");
                    build = build.field_attribute(path(field.name()), attribute);
                }
                TYPE_BYTES if field.oneof_index.is_none() => {
                    build = build.field_attribute(path(field.name()), "#[serde(skip)]");
                }
                _ => {}
            }
        }
        for (index, oneof) in message.oneof_decl.iter().enumerate() {
            let synthetic = message.field.iter().any(|f| f.proto3_optional() && f.oneof_index == Some(index as i32));
            if !synthetic {
                build = build.field_attribute(path(oneof.name()), "#[serde(flatten)]");
            }
        }
    }
    // The one `bytes` inside a oneof: an upload's data is never printed.
    build = build.field_attribute(format!("{PACKAGE}.UploadDatasetRequest.message.data"), "#[serde(skip)]");
    build.compile_fds(descriptors)?;

    // The stub libraries of a toolkit outside the linker's own search path; see deploy/cuda/.
    println!("cargo:rerun-if-env-changed=DELTASERVE_CUDA_LIB");
    if let Ok(dir) = env::var("DELTASERVE_CUDA_LIB") {
        println!("cargo:rustc-link-search=native={dir}");
    }
    Ok(())
}

/// `JobState` -> `job_state`.
fn snake(name: &str) -> String {
    let mut out = String::new();
    for c in name.chars() {
        if c.is_ascii_uppercase() && !out.is_empty() {
            out.push('_');
        }
        out.push(c.to_ascii_lowercase());
    }
    out
}
