//! `draftsmith inspect`.

use draftsmith::catalogue::catalogued;
use draftsmith::cli;
use draftsmith::inspect::inspect;

use super::Session;
use crate::failure::Failure;
use crate::printer;

pub(crate) fn run(args: &cli::Inspect, session: &Session) -> Result<u8, Failure> {
    let named = !args.path.exists() && catalogued(&args.path.to_string_lossy()).is_some();
    let path = if named { session.bundle(&args.path)? } else { args.path.clone() };
    let node = inspect(&path, !args.no_hashes)?;
    match args.json {
        true => printer::json(&node)?,
        false => printer::out(&node.text())?,
    }
    Ok(0)
}
