//! `draftsmith completions` and `draftsmith man`.

use draftsmith::{Error, cli, formats};

use crate::failure::Failure;
use crate::printer;

pub(crate) fn completions(args: &cli::Completions) -> Result<u8, Failure> {
    printer::bytes(&cli::completion_script(args.shell))?;
    Ok(0)
}

pub(crate) fn man(args: &cli::Man) -> Result<u8, Failure> {
    let pages = cli::man_pages();
    match &args.dir {
        None => printer::bytes(&pages[0].1)?,
        Some(dir) => {
            for (name, page) in &pages {
                formats::atomic::write(dir.join(name), page).map_err(Error::from)?;
            }
        }
    }
    Ok(0)
}
