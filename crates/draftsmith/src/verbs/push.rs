//! `draftsmith push`.

use draftsmith::bundle::{Manifest, machine_places};
use draftsmith::disk::human;
use draftsmith::pull::{PushOptions, Reference, push, push_plan};
use draftsmith::report::Report;
use draftsmith::{Error, cli};

use super::Session;
use crate::failure::Failure;
use crate::printer;

/// Repository and branch of the reference.
fn place(reference: &str) -> Result<(String, String), Failure> {
    match reference.parse::<Reference>().map_err(Error::from)? {
        Reference::Hf { repo, revision, file: None } => Ok((repo, revision)),
        Reference::Path(path) if draftsmith::pull::is_hub_name(&path) => Err(Failure::input(
            format!("`{reference}` is a path, and a push goes to a repository"),
            Some(format!("write `hf:{reference}`")),
        )),
        Reference::Hf { .. } | Reference::Pip { .. } | Reference::PipParts(_) | Reference::Path(_) => {
            Err(Failure::input(
                format!("`{reference}` is no repository of a hub"),
                Some(
                    "write `hf:ORG/NAME`, or `hf:ORG/NAME@BRANCH` for another branch than `main`".to_string(),
                ),
            ))
        }
    }
}

pub(crate) fn run(args: &cli::Push, session: &Session) -> Result<u8, Failure> {
    let (repo, revision) = place(&args.reference)?;
    let folder = args.bundle.as_path();
    let manifest = Manifest::read(folder).map_err(Error::from)?;
    // A bundle of an earlier version may still say where its maker keeps things.
    if let Some(place) = machine_places(folder, &manifest).map_err(Error::from)?.first() {
        return Err(Failure::input(
            format!("bundle `{}` names `{place}`, a place of the machine that made it", folder.display()),
            Some(format!("`draftsmith bundle card {}` writes it anew without", folder.display())),
        ));
    }
    let elsewhere = |reference: &String| reference.starts_with("hf:") || reference.starts_with("pip:");
    if !manifest.target.references.iter().any(elsewhere) {
        let named = manifest.target.references.first().unwrap_or(&manifest.target.name);
        session.printer.note(&format!(
            "warning: the bundle names its target as `{named}`, which others cannot fetch: they must give `--target REF`"
        ));
    }
    let summary = args.message.clone().unwrap_or_else(|| format!("Bundle {}", manifest.name));
    let options = PushOptions {
        folder,
        files: &manifest.files,
        repo: &repo,
        revision: &revision,
        private: args.private,
        summary: &summary,
    };
    if args.dry_run {
        let plan = push_plan(&session.places, &options).map_err(Error::from)?;
        if args.json {
            printer::json(&plan)?;
            return Ok(0);
        }
        let mut text = format!(
            "{}, branch {}{}\n",
            plan.url,
            plan.revision,
            if plan.private { ", for its owners only" } else { "" }
        );
        for file in &plan.files {
            text.push_str(&format!("  {}  {} bytes  sha256 {}\n", file.path, file.bytes, file.sha256));
        }
        text.push_str(&format!("{} files, {}; nothing was sent\n", plan.files.len(), human(plan.bytes)));
        printer::out(&text)?;
        return Ok(0);
    }
    let pushed = push(&session.places, &options, &session.printer, &session.stop).map_err(Error::from)?;
    if args.json {
        printer::json(&pushed)?;
        return Ok(0);
    }
    let commit = pushed.commit.as_deref().map_or(String::new(), |commit| format!(", commit {commit}"));
    let branch = if revision == "main" { String::new() } else { format!("@{revision}") };
    printer::out(&format!(
        "{}{commit}\n  {}{} files committed, {} there before, {} of large files sent\n  use it with `--bundle hf:{repo}{branch}`\n",
        pushed.url,
        if pushed.created { "repository made; " } else { "" },
        pushed.committed.len(),
        pushed.unchanged.len(),
        human(pushed.bytes_sent)
    ))?;
    Ok(0)
}
