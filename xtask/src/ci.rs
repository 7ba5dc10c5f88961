//! `cargo xtask ci`: the checks of `.ci/run`, which is their one list.

use std::process::{Command, ExitCode};

use anyhow::{Context, Result};
use clap::Args;

use crate::tree::Tree;

/// Runs the checks of `.ci/run`, all of them or those that are named.
#[derive(Debug, Args)]
pub(crate) struct Ci {
    /// Print the checks and do none
    #[arg(long)]
    list: bool,
    /// Checks to run (default: all)
    #[arg(value_name = "CHECK")]
    checks: Vec<String>,
}

pub(crate) fn run(tree: &Tree, args: &Ci) -> Result<ExitCode> {
    let mut command = Command::new("bash");
    command.arg(".ci/run").current_dir(&tree.root);
    if args.list {
        command.arg("--list");
    }
    let status = command.args(&args.checks).status().context("bash does not start")?;
    Ok(ExitCode::from(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1)))
}
