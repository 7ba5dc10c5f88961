//! `draftsmith pull`.

use std::path::Path;

use draftsmith::Error;
use draftsmith::catalogue::catalogued;
use draftsmith::cli;
use draftsmith::formats::hash::is_sha256_hex;
use draftsmith::pull::{Pulled, Reference, pull};

use super::Session;
use crate::failure::Failure;
use crate::printer;

pub(crate) fn run(args: &cli::Pull, session: &Session) -> Result<u8, Failure> {
    // A name of the catalogue is one of a bundle, as everywhere.
    if let [name] = args.references.as_slice()
        && let Some(entry) = catalogued(name)
        && !Path::new(name).exists()
        && args.sha256.is_none()
    {
        let path = session.bundle(Path::new(name))?;
        let (reference, bytes) = (entry.name.clone(), entry.bytes);
        return told(&Pulled { path, reference, sha256: None, bytes, cached: true }, args);
    }
    let references = args
        .references
        .iter()
        .map(|r| r.parse::<Reference>())
        .collect::<Result<Vec<_>, _>>()
        .map_err(Error::from)?;
    let sha256 = args.sha256.as_ref().map(|s| s.to_ascii_lowercase());
    if let Some(bad) = sha256.as_ref().filter(|s| !is_sha256_hex(s)) {
        return Err(Failure::input(
            format!("--sha256 `{bad}` is not a sha256"),
            Some("it has 64 hex digits; `sha256sum FILE` prints one".to_string()),
        ));
    }
    let pulled = pull(&references, sha256.as_deref(), &session.places, &session.printer, &session.stop)
        .map_err(Error::from)?;
    told(&pulled, args)
}

fn told(pulled: &Pulled, args: &cli::Pull) -> Result<u8, Failure> {
    if args.json {
        printer::json(pulled)?;
    } else {
        printer::out(&format!("{}\n", pulled.path.display()))?;
    }
    Ok(0)
}
