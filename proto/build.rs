//! Compiles the protocol without protoc, writes the descriptor set that server reflection serves, and tells the linker
//! where a CUDA toolkit's libraries are.

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message;

const FILES: [&str; 4] = ["inference", "deltas", "training", "server"];

fn main() -> Result<(), Box<dyn Error>> {
    let files: Vec<String> = FILES.iter().map(|f| format!("proto/deltaserve/v1/{f}.proto")).collect();
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(&files, ["proto"])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("deltaserve.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure().bytes(".").compile_fds(descriptors)?;

    // The stub libraries of a toolkit outside the linker's own search path; see deploy/cuda/.
    println!("cargo:rerun-if-env-changed=DELTASERVE_CUDA_LIB");
    if let Ok(dir) = env::var("DELTASERVE_CUDA_LIB") {
        println!("cargo:rustc-link-search=native={dir}");
    }
    Ok(())
}
