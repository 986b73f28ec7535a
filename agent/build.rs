//! Turns the contract into code, without a `protoc`.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let contract = "proto/valkeeper/agent/v1/agent.proto";
    println!("cargo::rerun-if-changed={contract}");
    let descriptors = protox::compile([contract], ["proto"])?;
    tonic_prost_build::configure().compile_fds(descriptors)?;
    Ok(())
}
