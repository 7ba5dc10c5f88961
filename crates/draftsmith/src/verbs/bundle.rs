//! `draftsmith bundle check`.

use draftsmith::Error;
use draftsmith::bundle::{CheckReport, check_alone, check_with_target};
use draftsmith::cli;
use draftsmith::engine::{LoadedTarget, TargetOptions, default_threads};
use draftsmith::kernels::Cpu;
use draftsmith::model::Precision;

use super::Session;
use crate::failure::{Failure, NOT_HELD};
use crate::printer;

pub(crate) fn run(args: &cli::BundleCheck, session: &Session) -> Result<u8, Failure> {
    let report: CheckReport = match &args.target {
        None => check_alone(&args.dir, &Cpu::new(default_threads())).map_err(Error::from)?,
        Some(reference) => {
            // A folder that is no bundle is told before a model is fetched.
            draftsmith::bundle::Manifest::read(&args.dir).map_err(Error::from)?;
            let target = LoadedTarget::load(
                &TargetOptions {
                    sources: std::slice::from_ref(reference),
                    sha256: None,
                    precision: Precision::Stored,
                    threads: default_threads(),
                    template: None,
                },
                &session.places,
                &session.printer,
                &session.stop,
            )?;
            check_with_target(&args.dir, &target.info(), &target.target).map_err(Error::from)?
        }
    };
    if args.json {
        printer::json(&report)?;
    } else {
        printer::out(&report.text())?;
    }
    Ok(if report.holds { 0 } else { NOT_HELD })
}
