//! `draftsmith inspect`.

use draftsmith::cli;
use draftsmith::inspect::inspect;

use crate::failure::Failure;
use crate::printer;

pub(crate) fn run(args: &cli::Inspect) -> Result<u8, Failure> {
    let node = inspect(&args.path, !args.no_hashes)?;
    match args.json {
        true => printer::json(&node)?,
        false => printer::out(&node.text())?,
    }
    Ok(0)
}
