//! Copies the program: a member's container has no other way to get it than a volume.

use anyhow::Context;
use std::{fs, os::unix::fs::PermissionsExt, path::Path};

/// Name of the program in the volume.
const NAME: &str = "valkeeper-agent";

/// Copies this program into `dir`, whole or not at all.
pub fn install(dir: &Path) -> anyhow::Result<()> {
    let program = std::env::current_exe().context("this program's own path")?;
    let (temporary, target) = (dir.join(format!(".{NAME}")), dir.join(NAME));
    fs::copy(&program, &temporary).with_context(|| temporary.display().to_string())?;
    fs::set_permissions(&temporary, fs::Permissions::from_mode(0o555))?;
    fs::rename(&temporary, &target).with_context(|| target.display().to_string())?;
    Ok(())
}
