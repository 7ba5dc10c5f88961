//! The draftsmith binary: parse, resolve, run, report.

mod failure;
mod printer;
mod verbs;

use std::process::ExitCode;

use clap::Parser;
use draftsmith::cli::{Cli, DataVerb, Verb};

use crate::failure::Failure;
use crate::verbs::Session;

fn main() -> ExitCode {
    failure::report_panics();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return failure::from_clap(&error),
    };
    let session = Session::new(&cli);
    match run(cli, &session) {
        Ok(code) => ExitCode::from(code),
        Err(failure) => failure.print(),
    }
}

fn run(cli: Cli, session: &Session) -> Result<u8, Failure> {
    match cli.verb {
        Verb::Doctor(args) => verbs::doctor::run(&args, session),
        Verb::Pull(args) => verbs::pull::run(&args, session),
        Verb::Data(args) => match args.verb {
            DataVerb::Preview(args) => verbs::data::preview(&args, session),
        },
        Verb::Generate(args) => verbs::generate::run(&args, session),
        Verb::Bench(args) => verbs::bench::run(&args, session),
    }
}
