//! `cargo xtask tidy`: what holds for the whole tree and no compiler checks. `cargo xtask toy-kind`: what a new kind of
//! draft touches.
//!
//! `tidy` prints every finding, one a line, and ends with 1 if there is one. `--write` first writes the generated pages.

mod commands;
mod crates;
mod modules;
mod pages;
mod source;
mod text;
mod toy_kind;
mod tree;
mod uses;

use std::io::Write;
use std::process::ExitCode;

use anyhow::{Result, bail};

use tree::{Findings, Tree};

fn main() -> Result<ExitCode> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let write = match args.as_slice() {
        ["tidy"] => false,
        ["tidy", "--write"] => true,
        ["toy-kind"] => return toy_kind::run(&Tree::open()?),
        _ => bail!("usage: cargo xtask tidy [--write] | toy-kind"),
    };
    let tree = Tree::open()?;
    let mut findings = Findings::new();
    pages::check(&tree, write, &mut findings)?;
    crates::check(&tree, &mut findings)?;
    text::check(&tree, &mut findings)?;
    commands::check(&tree, &mut findings)?;
    let mut out = std::io::stdout().lock();
    for finding in &findings {
        writeln!(out, "{finding}")?;
    }
    if findings.is_empty() {
        writeln!(out, "tidy: {} files, nothing to complain about", tree.files.len())?;
        Ok(ExitCode::SUCCESS)
    } else {
        writeln!(out, "tidy: {} findings", findings.len())?;
        Ok(ExitCode::FAILURE)
    }
}
