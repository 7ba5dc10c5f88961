//! `draftsmith list`.

use draftsmith::cli;
use draftsmith::list::{ListOptions, list};

use super::Session;
use crate::failure::Failure;
use crate::printer;

pub(crate) fn run(args: &cli::List, session: &Session) -> Result<u8, Failure> {
    let found = list(&ListOptions {
        places: &session.places,
        roots: &session.roots,
        folders: &args.folders,
        hashes: args.hashes,
    })?;
    match args.json {
        true => printer::json(&found)?,
        false => printer::out(&found.text())?,
    }
    Ok(0)
}
