//! Work on the tree that no user needs: `cargo xtask tidy`, `ci`, `dist`, `toy-kind`.
//!
//! `tidy` checks what holds for the whole tree and no compiler checks: it prints every finding, one a line, and ends with 1
//! if there is one; `--write` first writes the generated pages.

mod ci;
mod commands;
mod crates;
mod dist;
mod modules;
mod packages;
mod pages;
mod records;
mod source;
mod text;
mod toy_kind;
mod tree;
mod uses;

use std::io::Write;
use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;

use tree::{Findings, Tree};

/// Work on the tree that no user needs.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
enum Xtask {
    /// Checks what holds for the whole tree and no compiler checks
    Tidy {
        /// Write the generated pages first
        #[arg(long)]
        write: bool,
    },
    Ci(ci::Ci),
    Dist(dist::Dist),
    /// Adds a kind of draft to a copy of the tree, and shows what that touches
    ToyKind,
}

fn main() -> Result<ExitCode> {
    let args = Xtask::parse();
    let tree = Tree::open()?;
    match &args {
        Xtask::Tidy { write } => tidy(&tree, *write),
        Xtask::Ci(args) => ci::run(&tree, args),
        Xtask::Dist(args) => dist::run(&tree, args).map(|()| ExitCode::SUCCESS),
        Xtask::ToyKind => toy_kind::run(&tree),
    }
}

fn tidy(tree: &Tree, write: bool) -> Result<ExitCode> {
    let mut findings = Findings::new();
    pages::check(tree, write, &mut findings)?;
    crates::check(tree, &mut findings)?;
    text::check(tree, &mut findings)?;
    commands::check(tree, &mut findings)?;
    packages::check(tree, &mut findings)?;
    records::check(tree, &mut findings)?;
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
