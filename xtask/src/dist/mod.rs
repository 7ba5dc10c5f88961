//! `cargo xtask dist`: what is handed out, from one program: a wheel, an archive, their bill of materials and checksums.
//!
//! The same program and commit give the same bytes: names are sorted, and no clock is asked.

mod archive;
mod elf;
mod notices;
mod parts;
mod sbom;
mod wheel;

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::Args;
use draftsmith::formats::atomic;

use crate::packages;
use crate::tree::Tree;
use parts::{Parts, sha256};

/// What is handed out may take this much of a wheel.
const PROGRAM_BYTES_MAX: usize = 30_000_000;
/// The same where the crates were not seen as one.
const PLAIN_BYTES_MAX: usize = 32 << 20;

/// Makes what is handed out: a wheel and an archive for one machine, with bills of materials and checksums.
#[derive(Debug, Args)]
pub(crate) struct Dist {
    /// Program to pack (default: it is built first)
    #[arg(long, value_name = "FILE")]
    program: Option<PathBuf>,
    /// How it is built: `dist` sees all crates as one, which takes longer and makes it a fifth smaller; `release` takes the objects
    /// that tests ran
    #[arg(long, value_name = "PROFILE", default_value = "dist", value_parser = ["dist", "release"], conflicts_with = "program")]
    profile: String,
    /// Build for another machine, from nothing, with cargo-zigbuild: `aarch64-unknown-linux-gnu`
    #[arg(long, value_name = "TRIPLE", conflicts_with = "program")]
    target: Option<String>,
    /// Oldest glibc to run on, by linking through zig (default: that of this machine; with `--target` 2.28)
    #[arg(long, value_name = "MAJOR.MINOR", conflicts_with = "program")]
    glibc: Option<String>,
    /// Folder for what is made
    #[arg(long, value_name = "DIR", default_value = "target/dist")]
    out: PathBuf,
    /// The wheel alone; its name is printed
    #[arg(long)]
    wheel_only: bool,
}

pub(crate) fn run(tree: &Tree, args: &Dist) -> Result<()> {
    let out = tree.root.join(&args.out);
    std::fs::create_dir_all(&out).with_context(|| format!("cannot make `{}`", out.display()))?;
    let program = match &args.program {
        Some(program) => program.clone(),
        None => build(tree, args, &out)?,
    };
    let program = stripped(&program, &out)?;
    let most = match args.program.is_none() && args.profile == "dist" {
        true => PROGRAM_BYTES_MAX,
        false => PLAIN_BYTES_MAX,
    };
    if program.len() > most {
        bail!("the stripped program has {} bytes, more than {most}", program.len());
    }
    let needs = elf::needs(&program)?;
    let triple = format!("{}-unknown-linux-gnu", needs.machine);
    let packages = packages::of_program(tree, &triple)?;
    let (id, root) = packages
        .iter()
        .find(|(_, p)| p.source.is_none() && p.name == "draftsmith")
        .context("no package `draftsmith`")?;
    let parts = Parts {
        tree,
        version: root.version.clone(),
        sbom: sbom::of(tree, &packages, id, &program)?,
        notices: notices::of(&packages)?,
        program,
        needs,
    };
    let mut made = vec![wheel::write(&parts, &out)?];
    if !args.wheel_only {
        made.push(archive::write(&parts, &out)?);
        let sbom = format!("draftsmith-{}-{}-linux.cdx.json", parts.version, parts.needs.machine);
        atomic::write(out.join(&sbom), &parts.sbom)?;
        made.push(sbom);
        checksums(&out)?;
        made.push(CHECKSUMS.to_string());
    }
    let (major, minor) = parts.needs.glibc;
    eprintln(&format!(
        "{} bytes of program for {}, glibc {major}.{minor} or newer",
        parts.program.len(),
        parts.needs.machine
    ));
    for file in made {
        println(&out.join(file).display().to_string());
    }
    Ok(())
}

/// Builds the program: for this machine as it is or linked against an older glibc, or for another machine.
fn build(tree: &Tree, args: &Dist, out: &Path) -> Result<PathBuf> {
    let (target, glibc, profile) = (args.target.as_deref(), args.glibc.as_deref(), args.profile.as_str());
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(&tree.root);
    let verb = match (target, glibc) {
        (Some(_), _) => "zigbuild",
        (None, Some(_)) => "rustc",
        (None, None) => "build",
    };
    command.args([verb, "--profile", profile, "--locked", "--package", "draftsmith", "--bin", "draftsmith"]);
    let mut folder = tree.root.join("target");
    if let Some(target) = target {
        command.args(["--target", &format!("{target}.{}", glibc.unwrap_or("2.28"))]);
        command.env("CARGO_PROFILE_RELEASE_STRIP", "symbols");
        folder.push(target);
    } else if let Some(glibc) = glibc {
        // The same objects with another linker: what an older glibc lacks ends in an error here.
        let linker = linker(glibc, out)?;
        command.arg("--").arg("-C").arg(format!("linker={}", linker.display())).args(["-C", "strip=symbols"]);
    }
    if command.status().context("cargo does not start")?.success() {
        return Ok(folder.join(profile).join("draftsmith"));
    }
    match verb {
        "build" => bail!("the program was not built"),
        _ => bail!(
            "the program was not built; by zig it needs `pip install cargo-zigbuild ziglang`, both on the path, and for another \
             machine `rustup target add {}`",
            target.unwrap_or("TRIPLE")
        ),
    }
}

/// A linker that takes the symbols of a glibc.
fn linker(glibc: &str, out: &Path) -> Result<PathBuf> {
    let path = out.canonicalize()?.join(".linker");
    let machine = std::env::consts::ARCH;
    let text =
        format!("#!/bin/sh\nexec cargo-zigbuild zig cc -- -target {machine}-linux-gnu.{glibc} \"$@\"\n");
    atomic::write(&path, text.as_bytes())?;
    #[cfg(unix)]
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    Ok(path)
}

/// The program without symbols. What has none is taken as it is, whichever machine it is for.
fn stripped(program: &Path, out: &Path) -> Result<Vec<u8>> {
    let bytes = std::fs::read(program).with_context(|| format!("cannot read `{}`", program.display()))?;
    if !elf::has_symbols(&bytes)? {
        return Ok(bytes);
    }
    let copy = out.join(".stripped");
    let done = Command::new("strip").arg("-o").arg(&copy).arg(program).status();
    if !done.context("`strip` does not start: install binutils")?.success() {
        bail!("`strip` refuses `{}`", program.display());
    }
    let bytes = std::fs::read(&copy)?;
    std::fs::remove_file(&copy)?;
    Ok(bytes)
}

const CHECKSUMS: &str = "SHA256SUMS";

/// As `sha256sum -c` reads it, over all that lies in the folder: programs for several machines may be made in turn.
fn checksums(out: &Path) -> Result<()> {
    let mut lines = Vec::new();
    for entry in std::fs::read_dir(out)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.starts_with("draftsmith-") && path.is_file() {
            lines.push(format!("{}  {name}\n", sha256(&std::fs::read(&path)?)));
        }
    }
    lines.sort_by(|a, b| a[66..].cmp(&b[66..]));
    atomic::write(out.join(CHECKSUMS), lines.concat().as_bytes())?;
    Ok(())
}

fn println(line: &str) {
    use std::io::Write;
    let _ = writeln!(std::io::stdout().lock(), "{line}");
}

fn eprintln(line: &str) {
    use std::io::Write;
    let _ = writeln!(std::io::stderr().lock(), "{line}");
}
