//! `draftsmith doctor`.

use std::fmt::Write;
use std::path::Path;

use draftsmith::cli;
use draftsmith::disk::human;
use draftsmith::doctor::{Doctor, Severity, examine};

use super::{Session, variable};
use crate::failure::{Failure, NOT_HELD};
use crate::printer;

pub(crate) fn run(args: &cli::Doctor, session: &Session) -> Result<u8, Failure> {
    let here = std::env::current_dir().unwrap_or_else(|_| Path::new(".").to_path_buf());
    let doctor = examine(&session.places, &here, variable);
    if args.json {
        printer::json(&doctor)?;
    } else {
        printer::out(&page(&doctor))?;
    }
    Ok(if doctor.is_well() { 0 } else { NOT_HELD })
}

fn page(doctor: &Doctor) -> String {
    let mut page = String::new();
    let mut row = |name: &str, value: String| {
        // Writing to a String cannot fail.
        let _ = writeln!(page, "{name:<10} {value}");
    };
    row("draftsmith", format!("{} on {}", doctor.version, doctor.platform));
    let threads = doctor.cpu.threads.map(|t| format!(", {t} threads")).unwrap_or_default();
    row("cpu", format!("{}{threads}", doctor.cpu.name.as_deref().unwrap_or("unknown")));
    let features: Vec<String> = doctor
        .cpu
        .features
        .iter()
        .map(|(n, on)| if *on { (*n).to_string() } else { format!("no {n}") })
        .collect();
    row("", features.join(", "));
    let size = |bytes: Option<u64>| bytes.map(human).unwrap_or_else(|| "unknown".to_string());
    let limit = doctor.memory.limit.map(|l| format!(", limited to {}", human(l))).unwrap_or_default();
    row("memory", format!("{} of {} free{limit}", size(doctor.memory.available), size(doctor.memory.total)));
    let gpus: Vec<&str> = doctor.gpus.iter().map(|g| g.name.as_str()).collect();
    row("gpu", if gpus.is_empty() { "none found".to_string() } else { gpus.join("; ") });
    let cuda = &doctor.cuda;
    match (&cuda.driver, &cuda.missing) {
        (Some(version), _) => row(
            "cuda",
            format!(
                "driver for CUDA {version} (`run.device=cuda` and `--device cuda`; nothing was measured on a card yet)"
            ),
        ),
        (None, missing) => row("cuda", missing.clone().unwrap_or_else(|| "unknown".to_string())),
    }
    for card in &cuda.cards {
        let (number, name) = (card.number, &card.name);
        row("", format!("cuda:{number}: {name}, compute {}, {}", card.capability, human(card.memory)));
    }
    for library in &cuda.libraries {
        let state = match (&library.path, &library.install) {
            (Some(path), _) => path.display().to_string(),
            (None, install) => format!("not found: {}", install.as_deref().unwrap_or("unknown")),
        };
        let only_for = library.only_for.map_or_else(String::new, |what| format!(" (for {what} only)"));
        row("", format!("{}{only_for}: {state}", library.name));
    }
    row("devices", doctor.devices.join(", "));
    for folder in &doctor.folders {
        let state = match (folder.exists, folder.writable) {
            (true, true) => "",
            (false, true) => ", not made yet",
            (_, false) => ", NOT writable",
        };
        row(
            "folder",
            format!("{}: {}, {} free{state}", folder.purpose, folder.path.display(), size(folder.free)),
        );
    }
    let copies = &doctor.packed_copies;
    row(
        "packed",
        format!("weights of {} models kept for the next start, {}", copies.count, human(copies.bytes)),
    );
    let python = doctor.python.version.as_deref().unwrap_or("not found");
    row("python", format!("{python}, {}", doctor.python.pip.as_deref().unwrap_or("no pip")));
    for (name, value) in &doctor.variables {
        row("variable", format!("{name}={value}"));
    }
    let _ = writeln!(page);
    for finding in &doctor.findings {
        let word = match finding.severity {
            Severity::Note => "note",
            Severity::Problem => "problem",
        };
        let _ = writeln!(page, "{word}: {}\n  hint: {}", finding.message, finding.hint);
    }
    let _ = writeln!(
        page,
        "{}",
        if doctor.is_well() { "All stages work here." } else { "Something is missing: see above." }
    );
    page
}
